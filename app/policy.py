"""The policy file: which goals count, in which order and how much. Read and checked here; `solver.goals` knows them.

name: links-first
tiers:                      # a better tier beats everything after it
  - {links: 1, numa: 2}     # inside a tier prices are multiplied by their weights and added up
  - {value: 1, repartition: 1}
worths: {serving: 2}        # where not everything can be placed, a serving pod counts twice
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.errors import BadInput
from solver import DEFAULT_POLICY, Policy
from solver.values import DEFAULT_VALUES, Values

Weight = Annotated[int, Field(ge=0, le=1_000_000)]
Worth = Annotated[int, Field(ge=1, le=1_000_000)]
Workload = Literal["training", "batch", "serving"]


class PolicyFile(BaseModel):
    """The file's form; a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=100)] = "unnamed"
    tiers: Annotated[list[dict[str, Weight]], Field(min_length=1, max_length=16)] = Field(
        default_factory=lambda: [dict(tier) for tier in DEFAULT_POLICY.tiers]
    )
    worths: dict[Workload, Worth] = Field(default_factory=dict)


def read_policy(path: Path, values: Values = DEFAULT_VALUES) -> Policy:
    """The policy of a YAML (or JSON) file. Raises BadInput with the place and what is wrong there."""
    try:
        said = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as problem:
        raise BadInput(f"cannot read {path}: {problem}") from None
    except yaml.YAMLError as problem:
        raise BadInput(f"{path} is not YAML: {' '.join(str(problem).split())}") from None
    return policy_of(said, values, where=str(path))


def policy_of(said: Any, values: Values = DEFAULT_VALUES, *, where: str = "policy") -> Policy:
    """The policy that parsed YAML describes. Raises BadInput."""
    try:
        file = PolicyFile.model_validate({} if said is None else said)
        tiers = tuple(tuple(tier.items()) for tier in file.tiers)
        return Policy(file.name, tiers, tuple(sorted(file.worths.items())), values)
    except ValidationError as wrong:
        first = wrong.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise BadInput(f"{where}: {place}: {first['msg']}") from None
    except ValueError as wrong:
        raise BadInput(f"{where}: {wrong}") from None
