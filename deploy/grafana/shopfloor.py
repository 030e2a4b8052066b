"""A firm's shop floor, on the views of the schema `shopfloor` in TimescaleDB (docs/watch.md)."""

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.models import dashboard

from deploy.grafana.parts import (
    BAD,
    GOOD,
    TIMESCALEDB,
    WARN,
    Part,
    Sql,
    board,
    lines,
    rows_of,
    states,
    tile,
    value_map,
)

# Machines that are picked, of the firm that is picked.
PICKED = "firm_id = ${firm} AND machine_id IN (${machine:csv})"


def picked(alias: str) -> str:
    """The same, of one of several views."""
    return f"{alias}.firm_id = ${{firm}} AND {alias}.machine_id IN (${{machine:csv}})"


STATES = value_map(
    {
        "3": ("working", "green"),
        "2": ("idle", "yellow"),
        "1": ("off", "#8e8e8e"),
        "0": ("no data", "#44444455"),
    }
)

# State of each minute from power. With thresholds in the machine's settings these count; else off is below 5 % of what the
# machine draws at its busiest (95 % quantile of the shown range), and working is from 60 % of it.
STATE = f"""
power AS (
SELECT r.machine_id, m.ts, m.mean,
coalesce(r.off_below, 0.05 * b.busy) AS off_below, coalesce(r.working_from, 0.6 * b.busy) AS working_from
FROM shopfloor.role r
JOIN shopfloor.minute m ON m.signal_id = r.signal_id AND m.machine_id = r.machine_id
CROSS JOIN LATERAL (
SELECT percentile_cont(0.95) WITHIN GROUP (ORDER BY p.mean) AS busy FROM shopfloor.minute p
WHERE p.signal_id = r.signal_id AND p.machine_id = r.machine_id AND $__timeFilter(p.ts)
) AS b
WHERE r.role = 'power' AND {picked("r")} AND $__timeFilter(m.ts)
),
state AS (
SELECT machine_id, ts, CASE WHEN mean < off_below THEN 1 WHEN mean < working_from THEN 2 ELSE 3 END AS state FROM power
)
"""

# Items of each minute: what a counter rose by. One that falls was set back: what came after counts. A minute that is lower than the
# ones before and after it was misread.
COUNTED = f"""
counted AS (
SELECT machine_id, role, ts, ideal_cycle_s,
CASE WHEN last >= before THEN last - before ELSE last END AS items
FROM (
SELECT machine_id, role, ideal_cycle_s, ts, last, lag(last) OVER (PARTITION BY machine_id, role ORDER BY ts) AS before
FROM (
SELECT r.machine_id, r.role, r.ideal_cycle_s, m.ts, m.last, lag(m.last) OVER beside AS earlier, lead(m.last) OVER beside AS later
FROM shopfloor.role r JOIN shopfloor.minute m ON m.signal_id = r.signal_id AND m.machine_id = r.machine_id
WHERE r.role IN ('total_count', 'good_count') AND {picked("r")} AND $__timeFilter(m.ts)
WINDOW beside AS (PARTITION BY r.machine_id, r.role ORDER BY m.ts)
) AS minute WHERE NOT coalesce(last < earlier AND later >= earlier, false)
) AS read WHERE before IS NOT NULL
)
"""

FIGURES = f"""
WITH {STATE}, {COUNTED},
time AS (
SELECT machine_id, count(*) FILTER (WHERE state = 3) AS working, count(*) FILTER (WHERE state = 2) AS idle,
count(*) FILTER (WHERE state = 1) AS off, count(*) AS known FROM state GROUP BY machine_id
),
items AS (
SELECT machine_id, max(ideal_cycle_s) AS ideal_cycle_s, sum(items) FILTER (WHERE role = 'total_count') AS total,
sum(items) FILTER (WHERE role = 'good_count') AS good FROM counted GROUP BY machine_id
),
figures AS (
SELECT t.*, i.total, i.good, t.working::float8 / nullif(t.known, 0) AS utilisation,
i.ideal_cycle_s * i.total / nullif(t.working * 60, 0) AS effectiveness, i.good / nullif(i.total, 0) AS quality
FROM time t LEFT JOIN items i USING (machine_id)
)
"""

ENERGY = f"""
SELECT m.machine_id, m.ts, m.mean * r.factor / 60 AS kwh
FROM shopfloor.role r JOIN shopfloor.minute m ON m.signal_id = r.signal_id AND m.machine_id = r.machine_id
WHERE r.role = 'power' AND {picked("r")} AND $__timeFilter(m.ts)
"""


def shopfloor() -> build.Dashboard:
    made = board(
        "smdih-shopfloor",
        "SMDIH: shop floor",
        "What a firm's machines do: states, use, OEE, energy, newest values, and alarms as marks on every picture.",
        [
            Part(
                "Now",
                [
                    tile(
                        "Machines with data",
                        Sql(
                            "SELECT count(*) FILTER (WHERE newest > $__timeTo()::timestamptz - INTERVAL '15 minutes') AS machines "
                            f"FROM shopfloor.machine WHERE {PICKED}",
                            as_table=True,
                        ),
                        why="Which sent within 15 minutes of the end of the shown range.",
                        levels=((None, WARN), (1, GOOD)),
                    ),
                    tile(
                        "Active alarms",
                        Sql(
                            f"SELECT count(*) AS alarms FROM shopfloor.alarm WHERE {PICKED} AND ended IS NULL",
                            as_table=True,
                        ),
                        why="Whose condition lasts, on the list.",
                        levels=((None, GOOD), (1, WARN), (10, BAD)),
                    ),
                    tile(
                        "Utilisation",
                        Sql(
                            f"{FIGURES} SELECT sum(working)::float8 / nullif(sum(known), 0) AS utilisation FROM figures",
                            as_table=True,
                        ),
                        why="Working, as a share of the minutes with data of the shown range.",
                        unit="percentunit",
                        decimals=0,
                    ),
                    tile(
                        "OEE, of all known time",
                        Sql(
                            f"{FIGURES} SELECT avg(utilisation * effectiveness * quality) AS oee FROM figures",
                            as_table=True,
                        ),
                        why="Utilisation x effectiveness x quality (TEEP), mean of the machines that count items. "
                        "OEE within the shifts: GET /v1/machines/{id}/kpis.",
                        unit="percentunit",
                        decimals=0,
                    ),
                    tile(
                        "Energy",
                        Sql(f"SELECT sum(kwh) AS energy FROM ({ENERGY}) AS minutes", as_table=True),
                        why="Of the shown range, from the mean power of each minute.",
                        unit="kwatth",
                        decimals=1,
                    ),
                    tile(
                        "Energy while idle",
                        Sql(
                            f"WITH {STATE} SELECT coalesce(sum(e.kwh), 0) AS idle FROM ({ENERGY}) AS e "
                            "JOIN state s USING (machine_id, ts) WHERE s.state = 2",
                            as_table=True,
                        ),
                        why="Drawn while nothing was made.",
                        unit="kwatth",
                        decimals=1,
                    ),
                ],
            ),
            Part(
                "What the machines did",
                [
                    states(
                        "States",
                        Sql(
                            f"WITH {STATE} SELECT s.ts AS time, m.name AS metric, s.state AS value "
                            "FROM state s JOIN shopfloor.machine m USING (machine_id) ORDER BY 1"
                        ),
                        why="From power, minute by minute, by the thresholds of the machine's settings, else estimated from the shown range. "
                        "Exactly, with the levels that the data have: GET /v1/machines/{id}/states.",
                        mappings=STATES,
                    ),
                    rows_of(
                        "Figures",
                        Sql(
                            f'{FIGURES} SELECT m.name AS machine, round(f.utilisation::numeric * 100) AS "utilisation %", '
                            'round(f.effectiveness::numeric * 100) AS "effectiveness %", round(f.quality::numeric * 100, 1) AS "quality %", '
                            'round((f.utilisation * f.effectiveness * f.quality)::numeric * 100) AS "OEE %", f.total AS items, '
                            'f.working AS "working min", f.idle AS "idle min", f.off AS "off min" '
                            "FROM figures f JOIN shopfloor.machine m USING (machine_id) ORDER BY 1",
                            as_table=True,
                        ),
                        why="Of the shown range. Empty: the machine has no such signal (docs/kpi.md).",
                        width=24,
                        height=7,
                    ),
                ],
            ),
            Part(
                "Energy",
                [
                    lines(
                        "Power",
                        Sql(
                            "SELECT $__timeGroupAlias(m.ts, $__interval), machine.name AS metric, avg(m.mean * r.factor) AS value "
                            "FROM shopfloor.role r JOIN shopfloor.minute m ON m.signal_id = r.signal_id AND m.machine_id = r.machine_id "
                            "JOIN shopfloor.machine machine ON machine.machine_id = r.machine_id "
                            f"WHERE r.role = 'power' AND {picked('r')} AND $__timeFilter(m.ts) "
                            "GROUP BY 1, 2 ORDER BY 1"
                        ),
                        why="Mean of each interval.",
                        unit="kwatt",
                        width=12,
                        stacked=True,
                    ),
                    lines(
                        "Energy by hour",
                        Sql(
                            "SELECT date_trunc('hour', e.ts) AS time, m.name AS metric, sum(e.kwh) AS value "
                            f"FROM ({ENERGY}) AS e JOIN shopfloor.machine m USING (machine_id) GROUP BY 1, 2 ORDER BY 1"
                        ),
                        why="From the mean power of each minute.",
                        unit="kwatth",
                        width=12,
                        stacked=True,
                        bars=True,
                    ),
                ],
            ),
            Part(
                "Signals and alarms",
                [
                    lines(
                        "Signals",
                        Sql(
                            "SELECT $__timeGroupAlias(m.ts, $__interval), machine.name || ': ' || s.name AS metric, avg(m.mean) AS value "
                            "FROM shopfloor.signal s JOIN shopfloor.minute m ON m.signal_id = s.signal_id AND m.machine_id = s.machine_id "
                            "JOIN shopfloor.machine machine ON machine.machine_id = s.machine_id "
                            f"WHERE {picked('s')} AND $__timeFilter(m.ts) "
                            "GROUP BY 1, 2 ORDER BY 1"
                        ),
                        why="Means of minutes. Pick one machine to see its signals well.",
                        width=24,
                        height=9,
                        low=None,
                    ),
                    rows_of(
                        "Newest values",
                        Sql(
                            "SELECT m.name AS machine, l.name AS signal, l.value, l.unit, l.ts AS time "
                            "FROM shopfloor.latest l JOIN shopfloor.machine m USING (machine_id) "
                            f"WHERE {picked('l')} ORDER BY 1, 2",
                            as_table=True,
                        ),
                        why="The newest value of each signal.",
                        height=10,
                    ),
                    rows_of(
                        "Alarms",
                        Sql(
                            "SELECT a.started AS time, a.severity, a.machine_path AS machine, a.signal_name AS signal, a.explanation, a.ended, "
                            "a.acknowledged FROM shopfloor.alarm a "
                            f"WHERE {picked('a')} AND $__timeFilter(a.started) "
                            "ORDER BY a.started DESC LIMIT 200",
                            as_table=True,
                        ),
                        why="Of the shown range, the newest first.",
                        height=10,
                    ),
                ],
            ),
        ],
        since="now-12h",
        refresh="1m",
    )
    firm = (
        build.QueryVariable("firm")
        .label("Firm")
        .datasource(TIMESCALEDB)
        .query("SELECT firm_id AS __value, name AS __text FROM shopfloor.firm ORDER BY name")
        .refresh(dashboard.VariableRefresh.ON_DASHBOARD_LOAD)
    )
    machine = (
        build.QueryVariable("machine")
        .label("Machines")
        .datasource(TIMESCALEDB)
        .query(
            "SELECT machine_id AS __value, name AS __text FROM shopfloor.machine WHERE firm_id = ${firm} ORDER BY name"
        )
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
    )
    return made.with_variable(firm).with_variable(machine).annotation(alarms())


class _AlarmMarks(dashboard.AnnotationQuery):
    """The SDK's annotation has no place for a query in SQL."""

    def to_json(self) -> dict[str, object]:
        sql = (
            "SELECT started AS time, coalesce(ended, now()) AS timeend, explanation AS text, "
            "severity || ',' || machine_path || ',' || signal_name AS tags FROM shopfloor.alarm "
            f"WHERE {PICKED} AND $__timeFilter(started) ORDER BY started LIMIT 500"
        )
        target = {"editorMode": "code", "format": "table", "rawQuery": True, "rawSql": sql, "refId": "Anno"}
        return super().to_json() | {"rawQuery": sql, "target": target}


class _Alarms(build.AnnotationQuery):
    def __init__(self) -> None:
        self._internal = _AlarmMarks()


def alarms() -> build.AnnotationQuery:
    return _Alarms().name("Alarms").datasource(TIMESCALEDB).enable(True).icon_color("red")
