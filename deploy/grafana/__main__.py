"""Write the dashboards: `python -m deploy.grafana`."""

import json
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana import anomaly, fund, ingest, matching, operator, shopfloor

FOLDER = Path(__file__).parent / "dashboards"


def dashboards() -> dict[str, Dashboard]:
    """By the name of their file."""
    return {
        "operator": operator.operator(),
        "ingest": ingest.ingest(),
        "anomaly": anomaly.anomaly(),
        "matching": matching.matching(),
        "fund": fund.fund(),
        "shopfloor": shopfloor.shopfloor(),
    }


def text_of(made: Dashboard) -> str:
    return json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, made in dashboards().items():
        (FOLDER / f"{name}.json").write_text(text_of(made))


if __name__ == "__main__":
    main()
