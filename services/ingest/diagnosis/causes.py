"""Why is there no data? Rules from what is known of a machine to plain words and a next step."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from services.ingest.domain import FUTURE_S_MAX, Reason

# A machine that was heard within this time counts as sending.
QUIET_AFTER_S: Final = 300
# Times that are so much older than their arrival are a clock, or a backlog; less is the network.
CLOCK_BEHIND_S: Final = 600
# From the door to the database it takes well under a second; past this the historian is behind.
STORED_WITHIN_S: Final = 5
CAUSES_MAX: Final = 10
SIMILAR: Final = 0.75
NAMES_COMPARED_MAX: Final = 50

_SECOND_US: Final = 1_000_000


@dataclass(frozen=True)
class Refusal:
    """All refusals of one kind. `machine_id` and `credential_id` 0: not known; `subject`: the machine as it was named, or the
    first characters of a key."""

    machine_id: int
    credential_id: int
    subject: str
    reason: str
    source: str
    door: str
    times: int
    samples: int
    first_us: int
    last_us: int
    example: str
    clock_off_us: int


@dataclass(frozen=True)
class Key:
    """A device key of the machine's firm."""

    id: int
    prefix: str
    label: str
    valid_from_us: int
    valid_to_us: int
    revoked_us: int
    used_us: int

    def state(self, now_us: int) -> str:
        if self.revoked_us:
            return "revoked"
        if now_us < self.valid_from_us:
            return "not_yet_valid"
        return "expired" if self.valid_to_us and now_us >= self.valid_to_us else "valid"

    def __str__(self) -> str:
        return f"{self.label!r} ({self.prefix}...)"


@dataclass(frozen=True)
class SignalSeen:
    """The newest stored value of a signal; time 0: none among the newest frames."""

    id: int
    name: str
    unit: str
    last_us: int
    value: float | None


@dataclass(frozen=True)
class Facts:
    """What is known of a machine. Times in microseconds, 0: never."""

    machine_id: int
    path: str
    now_us: int
    # The newest good batch: when a door took it, the newest time in it, and who sent it.
    received_us: int = 0
    newest_us: int = 0
    credential_id: int = 0
    source: str = ""
    # The newest frame in the database.
    stored_us: int = 0
    # Records of the machine's partition that are acknowledged and not stored yet; None: the message log does not answer.
    waiting_records: int | None = 0
    signals: list[SignalSeen] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)


@dataclass(frozen=True)
class Cause:
    """One answer. `cause` is a stable word in capitals."""

    cause: str
    text: str
    next_step: str
    last_us: int = 0
    times: int = 0
    samples: int = 0
    credential_id: int = 0
    example: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The most likely cause first; never empty."""

    causes: list[Cause]

    @property
    def verdict(self) -> Cause:
        return self.causes[0]


def diagnose(facts: Facts) -> Diagnosis:
    """What is wrong, most telling first; FLOWING where nothing is."""
    if _is_flowing(facts):
        since = [one for one in _newest_first(_of_its_sender(facts)) if one.last_us > facts.received_us]
        partly = [_of_refusal(facts, one) for one in [*_recent(_of_machine(facts), facts.now_us), *since]]
        late = [*_behind(facts), *_clock_behind(facts)]
        shut_out = [one for one in _of_keys(facts, facts.received_us + 1) if one.credential_id == facts.credential_id]
        offline = [one for one in partly if one.cause == Reason.NODE_OFFLINE and one.last_us > facts.received_us]
        if shut_out or offline:
            others = [one for one in partly if one.cause != Reason.NODE_OFFLINE]
            return Diagnosis([*shut_out, *offline, *late, *others][:CAUSES_MAX])
        flowing = Cause(
            "PARTLY_REFUSED" if partly else "FLOWING",
            f"Data arrives: the last of it {_ago(facts.received_us, facts.now_us)}"
            + (", but a part of it is put aside or refused." if partly else "."),
            partly[0].next_step if partly else "Nothing is to be done.",
            facts.received_us,
        )
        return Diagnosis([*late, flowing, *partly][:CAUSES_MAX])
    good_us = facts.received_us or facts.stored_us
    causes = [
        *_behind(facts),
        *(_of_refusal(facts, one) for one in _newest_first(_of_machine(facts)) if one.last_us >= good_us),
        *_wrong_names(facts, good_us),
        *_of_keys(facts, good_us),
        *(_of_refusal(facts, one) for one in _newest_first(_of_its_sender(facts)) if one.last_us >= good_us),
    ]
    return Diagnosis([*causes, _silence(facts)][:CAUSES_MAX])


def _is_flowing(facts: Facts) -> bool:
    return facts.now_us - facts.received_us <= QUIET_AFTER_S * _SECOND_US


def _recent(refusals: Iterable[Refusal], now_us: int) -> list[Refusal]:
    return [one for one in _newest_first(refusals) if now_us - one.last_us <= QUIET_AFTER_S * _SECOND_US]


def _newest_first(refusals: Iterable[Refusal]) -> list[Refusal]:
    return sorted(refusals, key=lambda one: -one.last_us)


def _of_machine(facts: Facts) -> Iterator[Refusal]:
    return (one for one in facts.refusals if one.machine_id == facts.machine_id)


def _of_its_sender(facts: Facts) -> Iterator[Refusal]:
    """What was refused without a machine: it is this machine's where its gateway sent it, or where nobody has sent yet."""
    for one in facts.refusals:
        is_key = one.reason.startswith("KEY_")
        if one.machine_id or is_key or one.reason == Reason.UNKNOWN_MACHINE:
            continue
        if not facts.credential_id or one.credential_id == facts.credential_id:
            yield one


def _behind(facts: Facts) -> Iterator[Cause]:
    if facts.waiting_records is None:
        yield Cause(
            "MESSAGE_LOG_AWAY",
            "The message log (Kafka) does not answer; while it is away the doors take nothing and tell senders to wait.",
            "An operator looks after the brokers. Gateways with a buffer send everything afterwards.",
        )
    elif facts.waiting_records and _is_behind(facts):
        yield Cause(
            "NOT_STORED_YET",
            f"Data was acknowledged {_ago(facts.received_us, facts.now_us)} and waits to be stored: "
            f"{facts.waiting_records} records of this machine's part of the message log are not stored yet.",
            "Nothing is lost. If the number does not fall, an operator looks whether the historian runs (its /readyz) and "
            "whether the database takes writes.",
            facts.received_us,
        )


def _is_behind(facts: Facts) -> bool:
    """What a door took a moment ago is not behind, it is on its way."""
    margin_us = STORED_WITHIN_S * _SECOND_US
    waits_long = facts.now_us - facts.received_us >= margin_us
    misses_much = 0 < facts.stored_us <= facts.newest_us - margin_us
    return facts.newest_us > facts.stored_us and (waits_long or misses_much)


def _clock_behind(facts: Facts) -> Iterator[Cause]:
    behind_us = facts.received_us - facts.newest_us
    if behind_us > CLOCK_BEHIND_S * _SECOND_US:
        yield Cause(
            "CLOCK_BEHIND",
            f"Data arrives, but bears times {_length(behind_us)} before its arrival: the newest is {_when(facts.newest_us)}.",
            "If the gateway is not sending a backlog, its clock is wrong, or it sends local time as UTC: set the clock by NTP.",
            facts.received_us,
            credential_id=facts.credential_id,
        )


def _wrong_names(facts: Facts, good_us: int) -> Iterator[Cause]:
    """A sender that names a machine which does not exist may mean this one."""
    unknown = [one for one in facts.refusals if one.reason == Reason.UNKNOWN_MACHINE and one.last_us >= good_us]
    likeness = {one: _likeness(one.subject, facts.path) for one in _newest_first(unknown)[:NAMES_COMPARED_MAX]}
    for one in sorted(likeness, key=lambda one: (-likeness[one], -one.last_us)):
        is_close = likeness[one] >= SIMILAR
        if one.subject.lower() == facts.path:
            yield Cause(
                "REGISTERED_LATER",
                f"{_sender(one)} sent for this machine before it was registered; what came then waits in quarantine.",
                'Replay it: POST /v1/machines/{id}/replay with {"reason": "UNKNOWN_MACHINE"}. What comes from now on is taken.',
                *(one.last_us, one.times, one.samples, one.credential_id, one.example),
            )
            continue
        if is_close or not facts.received_us:
            yield Cause(
                "UNKNOWN_MACHINE",
                f"{_sender(one)} sends for {one.subject!r}, which this firm has not registered"
                + (f"; it looks like {facts.path!r}." if is_close else "."),
                f"If this machine is meant: let the gateway name it {facts.path!r}, then replay what is in quarantine to it. "
                "Otherwise register that machine.",
                one.last_us,
                one.times,
                one.samples,
                one.credential_id,
                one.example,
            )


def _likeness(named: str, path: str) -> float:
    named = named.lower().strip("/")
    if named.rpartition("/")[2] == path.rpartition("/")[2]:
        return 1.0
    return difflib.SequenceMatcher(None, named, path).ratio()


def _of_keys(facts: Facts, good_us: int) -> Iterator[Cause]:
    """The key that the machine's gateway used last, or any of the firm's where nothing is known."""
    known = {key.id: key for key in facts.keys}
    mine = {facts.credential_id} if facts.credential_id in known else set(known)
    for one in _newest_first(one for one in facts.refusals if one.reason.startswith("KEY_")):
        if one.last_us < good_us or (one.credential_id and one.credential_id not in mine):
            continue
        if not one.credential_id and not any(known[each].prefix == one.subject for each in mine):
            continue
        yield _of_refusal(facts, one)
    refused = {one.credential_id for one in facts.refusals if one.reason.startswith("KEY_")}
    if facts.credential_id in known and facts.credential_id not in refused:
        key = known[facts.credential_id]
        words = _KEY_WORDS.get(key.state(facts.now_us))
        if words is not None:
            cause, text, step = words
            at = key.revoked_us or key.valid_to_us
            yield Cause(cause, f"The key {key} of this machine's gateway {text}.", step, at, credential_id=key.id)
    comes_by_mqtt = (
        bool(facts.received_us) and not facts.credential_id
    )  # where the broker knows the gateway, not the hub
    if not comes_by_mqtt and not any(key.state(facts.now_us) == "valid" for key in facts.keys):
        yield Cause(
            "NO_VALID_KEY",
            "The firm has no device key that is valid now, so no gateway can send, but by MQTT.",
            "Make a claim code (POST /v1/claim-codes) or a key (POST /v1/credentials) and put it into the gateway. A gateway that "
            "sends by MQTT needs an account at the broker instead.",
        )


_NEW_KEY: Final = "Make a new key for the gateway (POST /v1/credentials/{id}/rotate or a claim code) and put it in."
_KEY_WORDS: Final = {
    "revoked": ("KEY_REVOKED", "has been revoked", _NEW_KEY),
    "expired": ("KEY_EXPIRED", "is not valid any more", _NEW_KEY),
    "not_yet_valid": (
        "KEY_NOT_YET_VALID",
        "is not valid yet",
        "Use the key before it until then, or make one that is valid now.",
    ),
}

# What was wrong, and what to do; {example} is the sentence that the sender got.
_WORDS: Final[dict[str, tuple[str, str]]] = {
    Reason.UNKNOWN_SIGNAL: (
        "it holds signals that the machine does not have: {example}",
        "Add the signal (or accept the proposal), then replay the items from quarantine; or mend the name in the sender.",
    ),
    Reason.EMPTY_BATCH: ("it holds no values", "Look at the gateway's mapping: it sends messages without values."),
    Reason.SHAPE_MISMATCH: (
        "values and signals do not fit together: {example}",
        "Let the gateway send one value for each named signal, or its positions as registered.",
    ),
    Reason.NOT_FINITE: (
        "values are NaN or infinite",
        "Let the gateway leave a missing value out (or mark it absent) instead of sending NaN.",
    ),
    Reason.OUT_OF_RANGE: (
        "values are outside what the instrument can report",
        "Look at the sensor and its scaling; if the range in the registry is wrong, correct it and replay the items.",
    ),
    Reason.WRONG_TYPE: ("a value is of the wrong type: {example}", "Let the gateway send numbers, true or false."),
    Reason.MALFORMED: (
        "it could not be read: {example}",
        "Compare what the gateway sends with the door's description.",
    ),
    Reason.TOO_LARGE: ("it is too large: {example}", "Let the gateway send smaller parts."),
    Reason.DATA_BEFORE_BIRTH: (
        "{example}",
        "Nothing, if the node answers the hub's request for a rebirth. If it goes on, look whether the node may subscribe to its "
        "NCMD topic and publish its births.",
    ),
    Reason.NOT_IN_BIRTH: (
        "it holds metrics that the node's birth does not name: {example}",
        "Nothing, if the node answers the hub's request for a rebirth. If it goes on, its births leave metrics out: mend the node.",
    ),
    Reason.BAD_QUALITY: (
        "the gateway itself calls values bad: {example}",
        "Look at the sensor, its cable and the gateway's connection to the controller.",
    ),
    Reason.QUOTA_SAMPLES: (
        "the firm sends more samples a second than its quota",
        "Let gateways sample less often, or ask an operator for a higher quota. Nothing is lost where gateways have a buffer.",
    ),
    Reason.SLOW_DOWN: ("the hub was busy", "Nothing: senders try again. If it lasts, an operator looks at the doors."),
    "TRY_AGAIN": ("the message log did not answer", "An operator looks after the brokers; senders try again."),
    Reason.FORBIDDEN: ("its key is not for telemetry", "Give the gateway a device key."),
    Reason.INVALID: ("the request was not understood: {example}", "Mend the request in the gateway's settings."),
    Reason.KEY_UNKNOWN: (
        "a key that begins like one of this firm's was shown, but is none",
        "Compare the key in the gateway with the one that was issued: a character is missing or wrong. A lost key needs a new one.",
    ),
    Reason.KEY_REVOKED: ("its key has been revoked", _NEW_KEY),
    Reason.KEY_EXPIRED: ("its key is not valid any more", _NEW_KEY),
    Reason.KEY_NOT_YET_VALID: ("its key is not valid yet", "Use the key before it, or make one that is valid now."),
}


def _of_refusal(facts: Facts, one: Refusal) -> Cause:
    if one.reason == Reason.TIME_OUT_OF_WINDOW:
        return _wrong_time(one)
    if one.reason == Reason.NODE_OFFLINE:
        return Cause(
            one.reason,
            f"The gateway is offline since {_ago(one.last_us, facts.now_us)}: {one.example}.",
            "Look whether the gateway has power, network and a connection to the MQTT broker, and to the machine's controller.",
            one.last_us,
            one.times,
        )
    what, step = _WORDS.get(one.reason, ("it was refused: {example}", "Mend what the message says."))
    is_kept = one.samples or one.reason in (Reason.MALFORMED, Reason.WRONG_TYPE, Reason.EMPTY_BATCH)
    verb = "was put into quarantine" if is_kept else "was refused"
    how_often = f"{one.times} times, last {_ago(one.last_us, facts.now_us)}"
    text = f"What {_sender(one)} sent {verb}, {how_often}: {what.format(example=one.example)}"
    return Cause(
        one.reason,
        text.rstrip(".") + ".",
        step,
        one.last_us,
        one.times,
        one.samples,
        one.credential_id,
        one.example,
    )


def _wrong_time(one: Refusal) -> Cause:
    time_us = one.last_us + one.clock_off_us
    unit = next((name for name, factor in _WRONG_UNITS if _is_near(time_us * factor, one.last_us)), "")
    if unit:
        cause, text = "WRONG_TIME_UNIT", f"times look like {unit} where the door expects another unit"
        step = "Let the gateway send the unit that this door describes, then replay the items from quarantine."
    elif one.clock_off_us > 0:
        cause, text = "CLOCK_AHEAD", f"the gateway's clock is {_length(one.clock_off_us)} ahead ({_when(time_us)})"
        step = f"Set the clock by NTP (up to {FUTURE_S_MAX // 60} minutes ahead are taken), then send anew."
    else:
        cause, text = "CLOCK_BEHIND", f"the gateway's clock is {_length(-one.clock_off_us)} behind ({_when(time_us)})"
        step = "Set the clock by NTP (a new battery, if it starts in 1970 or 2000), then send anew."
    sentence = f"What {_sender(one)} sent was put into quarantine, {one.times} times: {text}."
    return Cause(cause, sentence, step, one.last_us, one.times, one.samples, one.credential_id, one.example)


_WRONG_UNITS: Final = (("milliseconds", 1_000), ("seconds", 1_000_000), ("nanoseconds", 1 / 1_000))


def _is_near(time_us: float, now_us: int) -> bool:
    return abs(time_us - now_us) < 366 * 86_400 * _SECOND_US


def _silence(facts: Facts) -> Cause:
    if not facts.received_us and not facts.stored_us:
        used = [key for key in facts.keys if key.used_us]
        if used:
            newest = max(used, key=lambda key: key.used_us)
            seen = (
                f"The firm's key {newest} was used {_ago(newest.used_us, facts.now_us)}, for other machines or in vain."
            )
        else:
            seen = "No device key of the firm has been used yet."
        return Cause(
            "NEVER_SENT",
            f"Nothing was ever received for this machine. {seen}",
            f"Look whether the gateway is on, has the door's address and a key, and names this machine {facts.path!r}.",
        )
    last = facts.received_us or facts.stored_us
    key = next((key for key in facts.keys if key.id == facts.credential_id), None)
    gateway = f"its gateway ({facts.source!r})" if facts.source else "its gateway"
    if key is not None and key.used_us - last > 60 * _SECOND_US:
        return Cause(
            "MACHINE_SILENT",
            f"The last data came {_ago(last, facts.now_us)}, while {gateway} or another with the same key was heard "
            f"{_ago(key.used_us, facts.now_us)}: the way to the hub works.",
            "Look at the machine, its controller and the cable to the gateway, and at the gateway's own log.",
            last,
            credential_id=key.id,
        )
    return Cause(
        "GATEWAY_SILENT",
        f"The last data came {_ago(last, facts.now_us)} and nothing has been heard of {gateway} since.",
        "Look whether the gateway has power and network, and whether a firewall lets it reach the door.",
        last,
        credential_id=facts.credential_id,
    )


def _sender(one: Refusal) -> str:
    return f"gateway {one.source!r}" if one.source else "a gateway"


def _ago(time_us: int, now_us: int) -> str:
    return f"{_length(max(0, now_us - time_us))} ago"


def _length(us: int) -> str:
    seconds = round(abs(us) / _SECOND_US)
    for size, name in ((365 * 86_400, "year"), (86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= size:
            count = seconds // size
            return f"{count} {name}{'' if count == 1 else 's'}"
    return f"{seconds} s"


def _when(time_us: int) -> str:
    try:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_us)).strftime("%Y-%m-%d %H:%M:%S UTC")
    except OverflowError:
        return "no date of this calendar"
