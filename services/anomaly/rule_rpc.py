"""Rules that firms write themselves by gRPC."""

from typing import Any

from services.anomaly.rules import RuleService
from services.anomaly.tuning_messages import entry_message, preview_message, rule_message, wanted_rule
from services.common.directory import Directory
from services.common.identity import bearer_key
from services.common.rpc import current_caller
from smdih.anomaly.v1 import rules_pb2 as pb
from smdih.anomaly.v1 import rules_pb2_grpc as pb_grpc


class RuleServicer(pb_grpc.RuleServiceServicer):
    def __init__(self, rules: RuleService, directory: Directory) -> None:
        self._rules = rules
        self._directory = directory

    async def CreateRule(self, request: pb.CreateRuleRequest, context: Any) -> pb.CreateRuleResponse:
        found = await self._rules.create(current_caller(), wanted_rule(request.text))
        return pb.CreateRuleResponse(rule=rule_message(self._directory, found))

    async def UpdateRule(self, request: pb.UpdateRuleRequest, context: Any) -> pb.UpdateRuleResponse:
        wanted = wanted_rule(request.text)
        found = await self._rules.change(current_caller(), request.id, wanted, version=request.version)
        return pb.UpdateRuleResponse(rule=rule_message(self._directory, found))

    async def StopRule(self, request: pb.StopRuleRequest, context: Any) -> pb.StopRuleResponse:
        found = await self._rules.stop(current_caller(), request.id, reason=request.reason)
        return pb.StopRuleResponse(rule=rule_message(self._directory, found))

    async def GetRule(self, request: pb.GetRuleRequest, context: Any) -> pb.GetRuleResponse:
        found, history = await self._rules.get(current_caller(), request.id)
        return pb.GetRuleResponse(
            rule=rule_message(self._directory, found), history=[entry_message(entry) for entry in history]
        )

    async def ListRules(self, request: pb.ListRulesRequest, context: Any) -> pb.ListRulesResponse:
        found = await self._rules.list(current_caller(), firm_id=request.firm_id, machine_id=request.machine_id)
        return pb.ListRulesResponse(rules=[rule_message(self._directory, one) for one in found])

    async def PreviewRule(self, request: pb.PreviewRuleRequest, context: Any) -> pb.PreviewRuleResponse:
        wanted = wanted_rule(request.text)
        found = await self._rules.preview(current_caller(), key_of(context), wanted, seconds=request.seconds)
        return preview_message(found)


def key_of(context: Any) -> str:
    """The caller's key, to ask ingest with it."""
    return bearer_key(str(dict(context.invocation_metadata() or ()).get("authorization", "")))
