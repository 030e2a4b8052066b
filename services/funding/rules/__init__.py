"""The fund's rules: pure functions over (facts, dated parameters), one module a topic.

Money is integer minor units (``_p`` pence, ``_c`` euro cents), rates are ``Fraction``, nothing reads a clock. Each
result carries ``code`` (a stable name for machines, None when the rule is met) and ``reasons`` (sentences with the
figures). Readings of ambiguous rules are in ``docs/decisions/0005-fund-rules.md``. This is software, not legal
advice.
"""
