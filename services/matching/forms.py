"""What the bodies and queries of every route are made of."""

from datetime import datetime
from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from services.common.clock import to_us

# Ids of the registry; 0: none named.
RegistryId = Annotated[int, Field(ge=0, le=2**63 - 1)]
TimeUs = Annotated[int, Field(ge=0, le=2**63 - 1)]
PageSize = Annotated[int, Query(description="at most 500; 0 means 100")]
PageToken = Annotated[str, Query(description="next_page_token of the page before")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def us(time_: datetime | None) -> int | None:
    return None if time_ is None else to_us(time_)
