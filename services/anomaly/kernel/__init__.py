"""The compiled inner loop of the detector: one causal pass over a batch of frames.

Everything here works on plain arrays so that numba can compile it; `detector.py` owns the arrays and gives them
names and a contract.  No `fastmath`: it may assume that NaN does not exist, and NaN is how an absent value looks.
"""
