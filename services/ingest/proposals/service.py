"""Signals that machines send and the registry does not know: proposed, accepted with what waits in quarantine, or dismissed."""

from dataclasses import dataclass

from services.common.clock import Clock
from services.common.database import Pool, transaction
from services.common.errors import AlreadyExists
from services.common.identity import Caller, Role
from services.common.outbox import OutboxRelay
from services.ingest.asked import PAGE_SIZE_DEFAULT, check_id, check_one_of, number_in_token, page_size_of
from services.ingest.diagnosis import proposal_store as store
from services.ingest.diagnosis.proposal_store import Proposal
from services.ingest.diagnosis.sightings import SightingsWriter
from services.ingest.domain import PAGE_SIZE_MAX, UNKNOWN_SIGNAL_POLICIES, NewSignal, Reason
from services.ingest.registry import audit_store
from services.ingest.registry import store as registry_store
from services.ingest.registry.registry import Registry
from services.ingest.telemetry.quarantine import Quarantine, Replayed
from smdih.directory.v1 import directory_pb2 as pb


@dataclass(frozen=True)
class Accepted:
    """The machine with its new signal, and what became of the samples that waited."""

    machine: pb.Machine
    replayed: Replayed


class Proposals:
    """For the firm whose machines they are, and operators."""

    def __init__(
        self,
        pool: Pool,
        relay: OutboxRelay,
        clock: Clock,
        writer: SightingsWriter,
        registry: Registry,
        quarantine: Quarantine,
    ) -> None:
        self._pool = pool
        self._relay = relay
        self._clock = clock
        self._writer = writer
        self._registry = registry
        self._quarantine = quarantine

    async def policy(self, caller: Caller, firm_id: int) -> str:
        """What happens to unknown signals of the firm: refuse or propose. Raises NotFound."""
        self._check(caller, firm_id)
        async with transaction(self._pool) as connection:
            return await store.policy(connection, firm_id)

    async def set_policy(self, caller: Caller, firm_id: int, policy: str) -> None:
        """The doors know it within a second. Raises NotFound, Invalid."""
        self._check(caller, firm_id)
        check_one_of(policy, UNKNOWN_SIGNAL_POLICIES, "policy")
        now_us = self._clock.now_us()
        async with transaction(self._pool) as connection:
            before = await store.policy(connection, firm_id)
            if before == policy:
                return
            await store.set_policy(connection, firm_id, policy)
            await registry_store.publish_firm(connection, firm_id, now_us)
            await audit_store.note(
                connection,
                now_us,
                firm_id=firm_id,
                credential_id=caller.credential_id,
                action="unknown signals",
                detail=f"{before} -> {policy}",
            )
        self._relay.kick()

    async def page(
        self,
        caller: Caller,
        firm_id: int,
        machine_id: int,
        page_size: int,
        page_token: str,
        *,
        with_dismissed: bool = False,
    ) -> tuple[list[Proposal], str]:
        """In order of id, and the token of the next page. Operators see all with firm_id 0."""
        caller.require(Role.OPERATOR, Role.FIRM)
        firm_id = caller.firm_or(firm_id)
        for number, what in ((firm_id, "firm_id"), (machine_id, "machine_id")):
            if number:
                check_id(number, what)
        size = page_size_of(page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        after = number_in_token(page_token)
        await self._writer.write(machines=False)
        async with transaction(self._pool) as connection:
            found = await store.page(connection, firm_id, machine_id, after, size + 1, with_dismissed=with_dismissed)
        return found[:size], str(found[size - 1].id) if len(found) > size else ""

    async def accept(self, caller: Caller, proposal_id: int, new: NewSignal) -> Accepted:
        """Make the signal (the name is the proposal's) and replay what waits for it in quarantine.

        A call that failed half-way is repeated: the signal is made once. Raises NotFound, Conflict (over the quota), Invalid.
        """
        proposal = await self._seen_by(caller, proposal_id)
        signal = NewSignal(proposal.name, new.unit, new.range_min, new.range_max)
        try:
            machine = await self._registry.add_signals(caller, proposal.machine_id, [signal])
        except AlreadyExists:
            machine = await self._registry.machine(caller, proposal.machine_id)
        replayed = await self._quarantine.replay_all(
            caller, proposal.machine_id, Reason.UNKNOWN_SIGNAL, signal=proposal.name
        )
        now_us = self._clock.now_us()
        async with transaction(self._pool) as connection:
            await store.remove(connection, proposal_id)
            await audit_store.note(
                connection,
                now_us,
                firm_id=proposal.firm_id,
                credential_id=caller.credential_id,
                action="signal proposal accepted",
                detail=f"{proposal.name!r} of {proposal.path}, {replayed.accepted} samples replayed",
            )
        return Accepted(machine, replayed)

    async def dismiss(self, caller: Caller, proposal_id: int) -> None:
        """Show it no more; its samples stay in quarantine."""
        proposal = await self._seen_by(caller, proposal_id)
        if proposal.dismissed is not None:
            return
        now_us = self._clock.now_us()
        async with transaction(self._pool) as connection:
            await store.dismiss(connection, proposal_id, now_us)
            await audit_store.note(
                connection,
                now_us,
                firm_id=proposal.firm_id,
                credential_id=caller.credential_id,
                action="signal proposal dismissed",
                detail=f"{proposal.name!r} of {proposal.path}",
            )

    async def _seen_by(self, caller: Caller, proposal_id: int) -> Proposal:
        caller.require(Role.OPERATOR, Role.FIRM)
        check_id(proposal_id, "proposal_id")
        async with transaction(self._pool) as connection:
            proposal = await store.locked(connection, proposal_id)
        caller.check_sees_firm(proposal.firm_id)
        return proposal

    @staticmethod
    def _check(caller: Caller, firm_id: int) -> None:
        caller.require(Role.OPERATOR, Role.FIRM)
        check_id(firm_id, "firm_id")
        caller.check_sees_firm(firm_id)
