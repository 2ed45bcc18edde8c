"""Write a trained policy as ONNX, for use without Python or torch.

    pip install onnx==1.23.2 onnxscript==0.7.2
    python scripts/export_onnx.py runs/quick policy.onnx

Input `observation` [n, O], raw, float32; output `action` [n, ...], for the
environment: what cql.load_policy returns, normaliser and bounds included,
deterministic; of a stacked run `--run 1` takes the second policy. The graph is
traced from the agent's own `choose`, so it holds whatever layers cql.py has.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import List, Optional

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cql


class RunPolicy(nn.Module):
    """One run of a stacked agent: raw observations [n, O] -> actions [n, ...]."""

    def __init__(self, agent: cql.Agent, run: int):
        super().__init__()
        for parameter in agent.parameters():
            parameter.data = parameter.data[run : run + 1]
        agent.runs = agent.runs[run : run + 1]
        self.agent = agent
        self.shape = agent.task.action_shape
        self.kind = np.dtype(agent.task.action_dtype)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        actions = self.agent.choose(observation.unsqueeze(0)).squeeze(0)  # [n, A]
        if actions.is_floating_point() and self.kind.kind in "iu":
            actions = actions.round()  # as Task.to_environment
        return actions.reshape(-1, *self.shape).to(getattr(torch, self.kind.name))


def export(checkpoint: str, path: str, run: int = 0) -> None:
    """Raises cql.UserError for a checkpoint or run that is not there."""
    policy = cql.load_policy(checkpoint, run)
    if not Path(path).absolute().parent.is_dir():
        raise cql.UserError(f"{path}: no such directory")
    example = torch.zeros(2, policy.task.observation_dim)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        torch.onnx.export(
            RunPolicy(policy.agent, run).eval(),
            (example,),
            path,
            input_names=["observation"],
            output_names=["action"],
            dynamic_shapes={"observation": {0: torch.export.Dim("n")}},
            dynamo=True,
            verbose=False,
            external_data=False,
        )


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str):
        raise cql.UserError(message)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The options. Raises cql.UserError."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help="a run's directory or a checkpoint")
    add("path", help="the .onnx file to write")
    add("--run", type=int, default=0, help="of a stacked run's policies")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """The command line; returns the exit status."""
    try:
        options = parse(argv)
        export(options.checkpoint, options.path, options.run)
    except cql.UserError as error:
        print(f"export_onnx.py: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as missing:
        install = __doc__.splitlines()[2].strip()
        print(f"export_onnx.py: error: {missing}: {install}", file=sys.stderr)
        return 2
    print(f"wrote {options.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
