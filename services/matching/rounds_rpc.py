"""The gRPC edge of rounds."""

from typing import Any

from services.common.messages import message_of
from services.common.rpc import current_caller
from services.matching.service import Matching
from smdih.matching.v1 import rounds_pb2 as pb
from smdih.matching.v1 import rounds_pb2_grpc


class RoundServicer(rounds_pb2_grpc.RoundServiceServicer):
    def __init__(self, matching: Matching) -> None:
        self._rounds = matching.rounds

    async def StartRound(self, request: pb.StartRoundRequest, context: Any) -> pb.StartRoundResponse:
        begun = await self._rounds.start_round(current_caller(), request.round_id)
        return pb.StartRoundResponse(round=message_of(pb.Round, begun))

    async def GetRound(self, request: pb.GetRoundRequest, context: Any) -> pb.GetRoundResponse:
        found = await self._rounds.get_round(current_caller(), request.round_id)
        return pb.GetRoundResponse(round=message_of(pb.Round, found))

    async def ListRounds(self, request: pb.ListRoundsRequest, context: Any) -> pb.ListRoundsResponse:
        found = await self._rounds.list_rounds(current_caller())
        return pb.ListRoundsResponse(rounds=[message_of(pb.Round, each) for each in found])
