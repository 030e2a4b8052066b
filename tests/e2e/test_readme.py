"""The README's first commands, word for word, as a newcomer types them."""

import asyncio
import json
import re

from localstack.servers import LOCAL, ROOT

COMMAND_DEADLINE_S = 200


async def run(command: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_shell(
        command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(COMMAND_DEADLINE_S):
        output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def test_the_first_commands_of_the_readme_show_the_whole_journey() -> None:
    commands = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[0].split("\n")
    assert "make demo" in commands
    (LOCAL / "demo" / "summary.json").unlink(missing_ok=True)
    for command in filter(None, commands):
        code, output = await run(command)
        assert code == 0, output[-3000:]
    summary = json.loads((LOCAL / "demo" / "summary.json").read_text())
    samples, alarms = summary["samples"], summary["alarms"]
    assert samples["sent"] == samples["acknowledged"] == samples["stored"] > 100_000
    assert (samples["lost"], samples["duplicated"]) == (0, 0)
    assert alarms["faults_known"] == alarms["faults_found"] == 5
    assert alarms["false"] <= 2
    assert summary["award"] == summary["award"] | {"grant_pence": 19_200_00, "co_investment_pence": 28_800_00}
    assert summary["trial_balance_pence"] == 0
    page = (LOCAL / "demo" / "report.html").read_text()
    assert page.count("<svg") == 15
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained


async def test_a_file_that_is_no_recording_is_told_in_one_line() -> None:
    code, output = await run("make demo INPUT=LICENSE")
    assert code != 0
    assert "demo: LICENSE: the header has one column" in output
    assert "Traceback" not in output
