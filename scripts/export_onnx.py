"""Export a trained policy to ONNX, for use without Python or PyTorch.

    pip install onnx==1.23.2 onnxscript==0.7.2
    python scripts/export_onnx.py runs/quick policy.onnx

The input `observation` holds raw observations, float32 [n, O]. The output
`action` [n, ...] is the deterministic action for the environment, as
cql.load_policy returns it. Normalization and action bounds are in the graph.
For example, with `pip install onnxruntime==1.31.1`:

    session = onnxruntime.InferenceSession("policy.onnx")
    (actions,) = session.run(None, {"observation": rows})

`--run 1` exports the second policy of a stacked run. The graph is traced from
the agent's own forward pass, so it includes any layers that cql.py has.
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
    """Policy of one run of a stacked agent.

    It maps raw observations [n, O] to environment actions [n, ...]."""

    def __init__(self, agent: cql.Agent, run: int):
        super().__init__()
        for tensor in agent.run_tensors().values():
            tensor.data = tensor.data[run : run + 1]
        agent.runs = agent.runs[run : run + 1]
        agent.layout = cql.Layout(batched=False)
        self.agent = agent
        self.shape = agent.task.action_shape
        self.kind = np.dtype(agent.task.action_dtype)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        actions = self.agent.actions(observation.unsqueeze(0)).squeeze(0)  # [n, A]
        if actions.is_floating_point() and self.kind.kind in "iu":
            actions = actions.round()  # as Task.to_environment does
        return actions.reshape(-1, *self.shape).to(getattr(torch, self.kind.name))


def export(checkpoint: str, path: str, run: Optional[int] = None) -> None:
    """Write the policy of a checkpoint to an ONNX file. run: as load_policy takes it.

    Raise UserError if the checkpoint, the run or the directory of the file does not
    exist, and cql.MachineError if the file cannot be written."""
    with cql.errors_as(cql.UserError, path, OSError):
        if Path(path).is_dir():
            raise cql.UserError(f"{path}: a directory; pass the name of a file")
        if not Path(path).absolute().parent.is_dir():
            raise cql.UserError(f"{path}: no such directory; create it first")
    policy = cql.load_policy(checkpoint, run)
    example = torch.zeros(2, policy.task.observation_dim)
    # torch.onnx warns that torchvision is not installed; it is not needed.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with (
        warnings.catch_warnings(action="ignore", category=FutureWarning),
        cql.errors_as(cql.MachineError, f"cannot write {path}", OSError),
    ):
        torch.onnx.export(
            RunPolicy(policy.agent, policy.run).eval(),
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
    """Argument parser that raises UserError with one line, without the usage text."""

    def error(self, message: str):
        raise cql.UserError(message)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """Return the parsed options. Raise UserError for invalid ones."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", help="directory of a run, or a checkpoint")
    add("path", help=".onnx file to write")
    add("--run", type=int, help="index of the policy in a stacked run (0)")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line and return its exit status.

    The status is 0 when done, 1 if the disk failed, 2 for invalid input or a missing
    package."""
    try:
        options = parse(argv)
        export(options.checkpoint, options.path, options.run)
    except cql.UserError as error:
        print(f"export_onnx.py: error: {error}", file=sys.stderr)
        return 2
    except cql.MachineError as error:
        print(f"export_onnx.py: failed: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as missing:
        install = __doc__.splitlines()[2].strip()
        print(f"export_onnx.py: error: {missing}: {install}", file=sys.stderr)
        return 2
    print(f"wrote {options.path}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every name
    sys.exit(main())
