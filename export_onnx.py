"""Write a trained policy as ONNX, for use without Python or torch.

    pip install onnx==1.23.2 onnxscript==0.7.2
    python export_onnx.py runs/quick policy.onnx       # of a stacked run: --run 1

Input `observation` [n, O], raw, float32; output `action` [n, ...], for the environment:
what cql.load_policy returns, normaliser and bounds included, deterministic.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import cql


class HostPolicy(nn.Module):
    """One run's policy in plain layers, [n, O] -> [n, *action shape]."""

    def __init__(self, agent: cql.Agent, run: int, shape: list):
        super().__init__()
        self.discrete, self.shape = isinstance(agent, cql.DiscreteCQL), shape
        network = agent.critic if self.discrete else agent.policy
        self.layers = [(x.weight[run].data, x.bias[run].data) for x in network.layers]
        self.low, self.high = agent.action_low, agent.action_high
        self.mean, self.std = agent.observation_mean, agent.observation_std

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        x = (observation - self.mean) / self.std
        for weight, bias in self.layers[:-1]:
            x = torch.relu(x @ weight + bias)  # a critic's layers have a dimension more
        x = x @ self.layers[-1][0] + self.layers[-1][1]
        if self.discrete:
            return x.mean(0).argmax(-1) + self.low.long()
        center = (self.high + self.low) / 2
        x = center + (self.high - center) * x[:, : len(self.low)].tanh()
        return x.clamp(self.low, self.high).reshape(-1, *self.shape)


def export(checkpoint: str, path: str, run: int = 0) -> None:
    """Raises cql.UserError for a checkpoint or run that is not there."""
    policy = cql.load_policy(checkpoint, run)
    if not Path(path).absolute().parent.is_dir():
        raise cql.UserError(f"{path}: no such directory")
    task, agent = policy.task, policy.agent
    place = [each["run"] for each in agent.runs].index(run)
    module = HostPolicy(agent, place, task.action_shape).eval()
    torch.onnx.export(
        module,
        (torch.zeros(2, task.observation_dim),),
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
