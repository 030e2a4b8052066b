"""Where things stand in the arrays of the kernel: the columns of states, configuration and events.

`ROW_*` and the bases after it address one series' row, `MACHINE_*` one machine's row, `JOINT_*` are offsets inside one
block of a machine's joint state.
"""

# --- components: what fired -------------------------------------------------------------------------------------
(
    RECORD, SHIFT_SHORT, SHIFT, SHIFT_LONG, LEVEL_LONG, CHANGE, SEASON, CYCLE, UNUSUAL, FLAT, DROPOUT, JOINT,
) = range(12)  # fmt: skip
COMPONENTS = (
    "record", "shift_short", "shift", "shift_long", "level_long", "change", "season", "cycle", "unusual", "flat",
    "dropout", "joint",
)  # fmt: skip
SCALES = 5  # octave pairs: the value itself and exponential means over 3, 12, 48 and 192 rows
SCALE_ROWS = (1.0, 3.0, 12.0, 48.0, 192.0)

# --- configuration vector ---------------------------------------------------------------------------------------
(
    C_RAISE, C_CLEAR, C_CALM_ROWS, C_HORIZON, C_CLIP, C_WARMUP, C_HOLD_US, C_HOLD_ROWS_MIN, C_HOLD_ROWS_MAX,
    C_HOLD_RATIO, C_FORGET, C_FORGET_US, C_RECORD_CAP, C_SHARE_UNIT, C_SCORE_BASE, C_SEASON_RATIO, C_SEASON_STEP,
    C_TAIL_MEMORY, C_JOINT_EW, C_JOINT_WARMUP, C_JOINT_GATE, C_JOINT_SHRINK, C_JOINT_HORIZON, C_JOINT_LEAK,
    C_JOINT_UNIT, C_JOINT_RAISE, C_YOUNG, C_RAISE_MIN, C_BUDGET_US, C_JOINT_SETTLING, C_CHANGE_ROWS, C_CHANGE_CLIP,
    C_SEASON_WAIT, C_CYCLE_LIKENESS,
) = range(34)  # fmt: skip

# --- state of one machine ---------------------------------------------------------------------------------------
(
    MACHINE_LAST_US, MACHINE_FRAMES, MACHINE_INTERVAL_US, MACHINE_ALARM_US, MACHINE_CALM, MACHINE_OFFSET, MACHINE_STATE,
    MACHINE_BEHIND_SINCE_US,
) = range(8)  # fmt: skip
MACHINE_FIELDS = 8

# --- state of one series (a row of float64) ---------------------------------------------------------------------
(
    ROW_N, ROW_LAST, ROW_MEAN, ROW_VAR, ROW_REPEATS, ROW_REPEATS_USUAL, ROW_PRESENT, ROW_ABSENT_RUN, ROW_HELD,
    ROW_HELD_AGE, ROW_OFFSET, ROW_ALARM_US, ROW_CALM, ROW_STATE, ROW_SHORT_TAIL, ROW_SHORT_TAIL_G, ROW_LONG_TAIL,
    ROW_LONG_TAIL_G, ROW_LAST_US, ROW_BEHIND_US,
) = range(20)  # fmt: skip
SCALE_BASE = 20  # mean, least, greatest for each scale
CHANGE_BASE = SCALE_BASE + 3 * SCALES  # the change scan: where the random walk is, its range, its candidates
CHANGE_KEPT = 4  # candidates each way; more did not find more
CHANGE_AT, CHANGE_SUM, CHANGE_LEAST, CHANGE_GREATEST, CHANGE_UP, CHANGE_DOWN = range(6)
CHANGE_HEAD = 6
WEEK_BASE = CHANGE_BASE + CHANGE_HEAD + 4 * CHANGE_KEPT  # two profiles: of the week, then of the found period
WEEK_BINS, CYCLE_BINS = 42, 24
(
    SEASON_BIN, SEASON_SUM, SEASON_COUNT, SEASON_ERROR, SEASON_TOTAL, SEASON_N, SEASON_MEAN, SEASON_LEAST,
    SEASON_GREATEST, SEASON_SINCE_US,
) = range(10)  # fmt: skip
SEASON_HEAD = 10
CYCLE_BASE = WEEK_BASE + SEASON_HEAD + WEEK_BINS
RING_BASE = CYCLE_BASE + SEASON_HEAD + CYCLE_BINS  # means of equal slots of time, in which the period is looked for
(
    RING_PERIOD_US, RING_SLOT_US, RING_SLOT, RING_SUM, RING_COUNT, RING_FIRST, RING_KEPT, RING_DUE, RING_MISSES,
    RING_ROUNDS, RING_ANCHOR_US,
) = range(11)  # fmt: skip
RING_HEAD = 11
RING_SLOTS = 64
SERIES_FIELDS = RING_BASE + RING_HEAD + RING_SLOTS

# --- joint state: blocks of at most BLOCK signals ---------------------------------------------------------------
BLOCK = 32
JOINT_N, JOINT_SINCE_FACTOR, JOINT_HELD, JOINT_HELD_AGE = range(4)
JOINT_HEAD = 4
JOINT_PER_SIGNAL = 3  # smoothed, mean, values seen

# --- events -----------------------------------------------------------------------------------------------------
(
    E_FRAME, E_SIGNAL, E_RAISED, E_COMPONENT, E_TIME_US, E_STARTED_US, E_SCORE, E_VALUE, E_EXPECTED, E_SPREAD,
    E_DISTANCE, E_SAMPLES, E_PERIOD_US, E_LEAD, E_LEAD_SHARE, E_NEXT, E_NEXT_SHARE,
) = range(17)  # fmt: skip
EVENT_FIELDS = 17

# Beyond it a number is no measurement (drivers say "none" by the largest float there is) and counts as absent; its squares and
# those of what is learned from smaller ones are far from overflow.
VALUE_MAX = 1e15

US_PER_DAY = 86_400_000_000
US_PER_WEEK = 7 * US_PER_DAY


def block_size(k: int) -> int:
    """Float64 fields of the joint state of k signals: head, signals, covariance and its factor packed by rows."""
    return JOINT_HEAD + k * JOINT_PER_SIGNAL + k * (k + 1)


def joint_size(width: int) -> int:
    """Float64 fields of joint state for a machine of `width` signals."""
    full, rest = divmod(width, BLOCK)
    return full * block_size(BLOCK) + (block_size(rest) if rest else 0)
