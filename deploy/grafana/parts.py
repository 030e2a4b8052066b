"""What the dashboards are put together from, so that they look and read alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common as common_builder
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.cog import builder as cog
from grafana_foundation_sdk.cog import variants
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

PROMETHEUS = dashboard.DataSourceRef(type_val="prometheus", uid="smdih-prometheus")
TIMESCALEDB = dashboard.DataSourceRef(type_val="grafana-postgresql-datasource", uid="smdih-timescaledb")
TAG = "smdih"
GRID_WIDTH = 24
GOOD, WARN, BAD, PLAIN = "green", "orange", "red", "text"
# Where docs/runbooks.md can be read; a variable of every dashboard, so that it is set in one place.
RUNBOOKS = "${runbooks}"

Steps = Sequence[tuple[float | None, str]]
# Anything is well; anything is bad.
NEUTRAL: Steps = ((None, PLAIN),)
NONE_IS_GOOD: Steps = ((None, GOOD), (1, BAD))
Panel = cog.Builder[dashboard.Panel]


class SqlQuery(variants.Dataquery):
    """A query of Grafana's PostgreSQL data source, which the SDK has no builder for."""

    def __init__(self, sql: str, ref_id: str, *, as_table: bool) -> None:
        self.sql = sql
        self.ref_id = ref_id
        self.hide = False
        self.as_table = as_table

    def to_json(self) -> dict[str, object]:
        return {
            "datasource": TIMESCALEDB.to_json(),
            "editorMode": "code",
            "format": "table" if self.as_table else "time_series",
            "rawQuery": True,
            "rawSql": self.sql,
            "refId": self.ref_id,
        }


@dataclass(frozen=True)
class Sql(cog.Builder[variants.Dataquery]):
    """`time`, values and labels as time series; or any columns as a table."""

    sql: str
    as_table: bool = False
    ref_id: str = "A"

    def build(self) -> variants.Dataquery:
        lines = [line.strip() for line in self.sql.strip().splitlines()]
        return SqlQuery("\n".join(lines), self.ref_id, as_table=self.as_table)


def query(expr: str, legend: str = "", *, ref: str = "A", instant: bool = False) -> prometheus.Dataquery:
    made = prometheus.Dataquery().expr(expr).ref_id(ref).datasource(PROMETHEUS)
    made = made.instant() if instant else made.range()
    return made.legend_format(legend) if legend else made


def steps(of: Steps) -> build.ThresholdsConfig:
    return (
        build.ThresholdsConfig()
        .mode(dashboard.ThresholdsMode.ABSOLUTE)
        .steps([dashboard.Threshold(value=value, color=color) for value, color in of])
    )


def runbook(section: str) -> build.DashboardLink:
    return (
        build.DashboardLink("What to do")
        .type(dashboard.DashboardLinkType.LINK)
        .url(f"{RUNBOOKS}#{section}")
        .target_blank(True)
    )


def tile(
    title: str,
    expr: str | Sql,
    *,
    why: str,
    unit: str = "short",
    levels: Steps = NEUTRAL,
    section: str = "",
    width: int = 4,
    decimals: int | None = None,
    mappings: Sequence[dashboard.ValueMapping] = (),
) -> Panel:
    """One number and whether it is well."""
    panel = (
        stat.Panel()
        .title(title)
        .description(why)
        .unit(unit)
        .thresholds(steps(levels))
        .color_scheme(build.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))
        .color_mode(common.BigValueColorMode.BACKGROUND if levels is not NEUTRAL else common.BigValueColorMode.NONE)
        .graph_mode(common.BigValueGraphMode.NONE if isinstance(expr, Sql) else common.BigValueGraphMode.AREA)
        .reduce_options(common_builder.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .no_value("no data")
        .span(width)
        .height(4)
        .datasource(TIMESCALEDB if isinstance(expr, Sql) else PROMETHEUS)
        .with_target(expr if isinstance(expr, Sql) else query(expr))
    )
    if decimals is not None:
        panel = panel.decimals(decimals)
    if mappings:
        panel = panel.mappings(list(mappings))
    return panel.links([runbook(section)]) if section else panel


def lines(
    title: str,
    *queries: tuple[str, str] | Sql,
    why: str,
    unit: str = "short",
    width: int = 8,
    height: int = 8,
    levels: Steps = (),
    stacked: bool = False,
    section: str = "",
    low: float | None = 0,
    high: float | None = None,
    bars: bool = False,
) -> Panel:
    """Lines over time: (expression, legend) each."""
    is_sql = isinstance(queries[0], Sql)
    panel = (
        timeseries.Panel()
        .title(title)
        .description(why)
        .unit(unit)
        .line_width(1)
        .fill_opacity(25 if stacked else 100 if bars else 8)
        .gradient_mode(common.GraphGradientMode.OPACITY)
        .show_points(common.VisibilityMode.NEVER)
        .span_nulls(is_sql)
        .legend(
            common_builder.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.TABLE)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(
            common_builder.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
        )
        .span(width)
        .height(height)
        .datasource(TIMESCALEDB if is_sql else PROMETHEUS)
    )
    if low is not None:
        panel = panel.min(low)
    if high is not None:
        panel = panel.max(high)
    if bars:
        panel = panel.draw_style(common.GraphDrawStyle.BARS)
    if stacked:
        panel = panel.stacking(common_builder.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    if levels:
        panel = panel.thresholds(steps(levels)).thresholds_style(
            common_builder.GraphThresholdsStyleConfig().mode(common.GraphTresholdsStyleMode.DASHED)
        )
    for number, one in enumerate(queries):
        target = one if isinstance(one, Sql) else query(*one, ref=chr(ord("A") + number))
        panel = panel.with_target(target)
    return panel.links([runbook(section)]) if section else panel


def states(title: str, sql: Sql, *, why: str, mappings: Sequence[dashboard.ValueMapping], height: int = 8) -> Panel:
    """Coloured bars of states over time."""
    return (
        statetimeline.Panel()
        .title(title)
        .description(why)
        .mappings(list(mappings))
        .show_value(common.VisibilityMode.NEVER)
        .merge_values(True)
        .row_height(0.85)
        .line_width(0)
        .fill_opacity(85)
        .legend(
            common_builder.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .span(GRID_WIDTH)
        .height(height)
        .datasource(TIMESCALEDB)
        .with_target(sql)
    )


def rows_of(
    title: str,
    source: str | Sql,
    *,
    why: str,
    width: int = 12,
    height: int = 8,
    unit: str = "",
    hidden: Sequence[str] = (),
    section: str = "",
) -> Panel:
    """A table: of a query in SQL, or of an instant query with a row for each series."""
    panel = table.Panel().title(title).description(why).span(width).height(height)
    if unit:
        panel = panel.unit(unit)
    if isinstance(source, Sql):
        panel = panel.datasource(TIMESCALEDB).with_target(source)
    else:
        panel = panel.datasource(PROMETHEUS).with_target(query(source, instant=True).format(PromQueryFormat.TABLE))
        excluded = {"Time": True} | dict.fromkeys(hidden, True)
        panel = panel.with_transformation(
            dashboard.DataTransformerConfig(id_val="organize", options={"excludeByName": excluded})
        )
    return panel.links([runbook(section)]) if section else panel


def value_map(colors: dict[str, tuple[str, str]]) -> list[dashboard.ValueMapping]:
    """Values with their text and colour."""
    return [
        dashboard.ValueMap(
            options={
                value: dashboard.ValueMappingResult(text=text, color=color, index=index)
                for index, (value, (text, color)) in enumerate(colors.items())
            }
        )
    ]


@dataclass(frozen=True)
class Part:
    """A row of the dashboard: what is asked, and the panels that answer it."""

    title: str
    panels: Sequence[Panel]


def board(
    uid: str, title: str, description: str, parts: Sequence[Part], *, since: str = "now-1h", refresh: str = "15s"
) -> build.Dashboard:
    made = (
        build.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .time(since, "now")
        .refresh(refresh)
        .readonly()
        .with_variable(build.ConstantVariable("runbooks").label("Runbooks").value("/docs/runbooks.md"))
        .link(
            build.DashboardLink("SMDIH")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(True)
            .keep_time(True)
        )
    )
    for part in parts:
        made = made.with_row(build.Row(part.title))
        for panel in part.panels:
            made = made.with_panel(panel)
    return made
