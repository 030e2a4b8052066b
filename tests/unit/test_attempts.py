"""When a loop that works through a topic should be started anew."""

import asyncio

import pytest

from services.common.kafka import Attempts


@pytest.mark.parametrize(("answer", "goes_on"), [(True, False), (False, True), (None, True)])
async def test_silence_is_a_reason_for_a_new_start_only_while_the_brokers_answer(
    answer: bool | None, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.common.kafka.attempts.ANSWER_TIMEOUT_S", 0.05)

    async def brokers_answer() -> bool:
        if answer is None:
            await asyncio.get_running_loop().create_future()
        return bool(answer)

    attempts = Attempts(brokers_answer, silence_s_max=0)
    assert await attempts.go_on() is goes_on


async def test_attempts_that_fail_are_no_silence() -> None:
    async def brokers_answer() -> bool:
        return True

    attempts = Attempts(brokers_answer, silence_s_max=0.2)
    for _ in range(3):
        await asyncio.sleep(0.1)
        attempts.ended()
        assert await attempts.go_on()
