"""The live view in the terminal: steps, rates, alarms, offers, award."""

import asyncio
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from demo.story import Story

REFRESH_S = 0.25
ALARMS_SHOWN = 6
OFFERS_SHOWN = 3


class View:
    """Shows a story while it happens; on something that is no terminal, one line for each step."""

    def __init__(self, story: Story, console: Console) -> None:
        self._story = story
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
        self._task: asyncio.Task[None] | None = None
        self._told = 0

    async def __aenter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._show()
        if self._live is not None:
            self._live.stop()

    async def _run(self) -> None:
        while True:
            self._show()
            await asyncio.sleep(REFRESH_S)

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._screen())
            return
        for step in self._story.steps[self._told :]:
            if step.ended_s is None:
                break
            self._console.print(f"{step.ended_s:6.1f} s  {step.title}: {step.outcome}", highlight=False)
            self._told += 1

    def _screen(self) -> Group:
        return Group(self._steps(), self._rates(), *self._alarms(), *self._offers())

    def _steps(self) -> Panel:
        table = Table.grid(padding=(0, 2))
        for step in self._story.steps:
            done = step.ended_s is not None
            table.add_row(
                Text("✓" if done else "…", style="green" if done else "yellow"),
                Text(f"{step.ended_s if step.ended_s is not None else self._story.elapsed_s:5.1f} s", style="dim"),
                step.title,
                Text(step.outcome, style="cyan"),
            )
        return Panel(table, title="Smart Manufacturing Data Innovation Hub", subtitle=self._story.input)

    def _rates(self) -> Panel:
        counts = self._story.counts
        figures = (
            ("sent", f"{counts.sent:,}"),
            ("acknowledged", f"{counts.acknowledged:,}"),
            ("stored", f"{counts.stored:,}"),
            ("samples/s", f"{self._story.rate:,.0f}"),
            ("records behind", f"{self._story.lag:,}"),
            ("restarts", str(self._story.restarts)),
        )
        table = Table.grid(expand=True)
        table.add_row(*(Text.assemble((f"{value}\n", "bold"), (name, "dim")) for name, value in figures))
        return Panel(table, title="telemetry")

    def _alarms(self) -> list[Panel]:
        if not self._story.alarms:
            return []
        table = Table.grid(padding=(0, 2))
        for alarm in self._story.alarms[-ALARMS_SHOWN:]:
            style = {"high": "red", "medium": "yellow"}.get(alarm["severity"], "white")
            table.add_row(
                Text(alarm["severity"], style=style), alarm["machine_path"].split("/", 2)[-1], alarm["explanation"]
            )
        return [Panel(table, title=f"{len(self._story.alarms)} alarms")]

    def _offers(self) -> list[Panel]:
        if not self._story.offers:
            return []
        table = Table.grid(padding=(0, 2))
        for offer in self._story.offers[:OFFERS_SHOWN]:
            reason = offer["reasons"][0] if offer["reasons"] else ""
            table.add_row(
                str(offer["rank"]), offer["provider_kind"], offer["provider_title"], Text(reason, style="dim")
            )
        return [Panel(table, title="who can help")]


def print_summary(story: Story, console: Console, report: str) -> None:
    """The end of the run: what was sent and stored, found, matched and awarded."""
    summary = story.summary()
    samples, alarms, award = summary["samples"], summary["alarms"], summary["award"]
    table = Table(title="The journey", show_header=False, title_style="bold")
    table.add_row("input", summary["input"])
    table.add_row(
        "samples",
        f"{samples['sent']:,} sent, {samples['acknowledged']:,} acknowledged, {samples['stored']:,} stored, "
        f"{samples['quarantined']:,} quarantined, {samples['refused']:,} refused",
    )
    good = samples["lost"] == 0 and samples["duplicated"] == 0
    table.add_row(
        "lost, duplicated",
        Text(f"{samples['lost']}, {samples['duplicated']}", style="bold green" if good else "bold red"),
    )
    judged = (
        ""
        if alarms["faults_known"] is None
        else f"; {alarms['faults_found']} of {alarms['faults_known']} known faults found, {alarms['false']} false"
    )
    table.add_row("alarms", f"{alarms['raised']} raised{judged}")
    if story.need:
        table.add_row("need", story.need["text"])
    if story.offers:
        table.add_row("match", f"{story.offers[0]['provider_title']} (best of {summary['offers']} offers)")
    if award:
        table.add_row(
            "award",
            f"£{award['grant_pence'] / 100:,.2f} grant with £{award['co_investment_pence'] / 100:,.2f} co-investment; "
            f"trial balance {summary['trial_balance_pence']} pence",
        )
    if story.restarts:
        table.add_row("restarts", f"{story.restarts} processes died and were started again")
    table.add_row("time", f"{summary['elapsed_s']} s, first sample stored after {summary['first_sample_s']} s")
    console.print(table)
    console.print(f"Pictures: {report}", highlight=False)
