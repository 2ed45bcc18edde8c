"""Write a trained policy as ONNX, for use without Python or torch.

    pip install onnx==1.23.2 onnxscript==0.7.2
    python export_onnx.py runs/quick policy.onnx       # of a stacked run: --run 1

Input `observation` [n, O], raw, float32; output `action` [n, ...], for the environment:
what cql.load_policy returns, normaliser and bounds included, deterministic. The graph is
traced from the agent's own `choose`, so it holds whatever layers cql.py has.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a checkpoint or a run's directory")
    parser.add_argument("path")
    parser.add_argument("--run", type=int, default=0)
    arguments = parser.parse_args()
    try:
        export(arguments.checkpoint, arguments.path, arguments.run)
        print(f"wrote {arguments.path}")
    except cql.UserError as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        parser.error(f"{error}: {__doc__.splitlines()[2].strip()}")
