"""Train a product of flags as trials of Ray Tune, on one machine or a cluster.

    pip install -r requirements-sweep.txt
    python scripts/sweep.py --config_path configs/hopper.yaml \\
        --seed '[0,1,2,3]' --cql_alpha '[1,5,10,20]' --per_trial seed \\
        --gpus 0.25 --dir runs/sweep

A flag of cql.py that holds a list is swept: there is a trial for each
combination, but the values of the flags that --per_trial names are trained
together, stacked, in one trial (here four trials of four seeds). Every other
flag is cql.py's own. A trial is the ordinary command `python cql.py ...
--resume DIR/TRIAL`, run in the present directory. One that is killed, or whose
machine goes away, is tried again, three times at most, and goes on from its
last checkpoint. After Ctrl-C the same command goes on as well.

On a cluster pass `--address auto`; DIR, this project and its Python must lie
under the same paths on every machine. In the end DIR holds evaluations.csv and
metrics.csv of all runs, numbered as if one process had trained them, besides
each trial's directory (DIR/TRIAL) and what it printed (DIR/TRIAL.log).
"""

import argparse
import csv
import ctypes
import itertools
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional

import filelock
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cql

os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the tables are cql.py's
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # one table of all trials
try:
    import pandas as pd
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
except ModuleNotFoundError as missing:
    print(f"sweep.py: error: {missing}: pip install -r requirements-sweep.txt")
    sys.exit(2)

SCORE = "d4rl_normalized_score"
TRIES_AGAIN = 3
STOPPED = "stopped early"  # in place of an exit status


@dataclass
class Trial:
    """One command of the sweep."""

    name: str
    directory: Path
    command: List[str]
    numbers: List[int]  # of its runs, in the whole product
    extra: Dict[str, object]  # swept flags that cql.py's tables do not hold

    def record(self) -> Path:
        """The file that tells how the trial ended."""
        return self.directory.with_name(self.name + ".json")

    def end(self):
        """Exit status of this very command, or STOPPED; None if it is still to run."""
        if not self.record().exists():
            return None
        record = json.loads(self.record().read_text())
        return record["end"] if record["command"] == self.command else None


def without(argv: List[str], names: List[str]) -> List[str]:
    """The command line without these flags and their values."""
    kept = []
    dropping = False
    for argument in argv:
        if argument.startswith("--"):
            dropping = argument[2:].partition("=")[0] in names
        if not dropping:
            kept.append(argument)
    return kept


def plan(argv: List[str], per_trial: List[str], directory: Path) -> List[Trial]:
    """The trials of cql.py's flags. Raises cql.UserError for what cql.py refuses."""
    flags = cql.read_command_line(argv)
    if "resume" in flags:
        raise cql.UserError("--resume: every trial has its own, under --dir")
    for name in per_trial:
        if name not in cql.SWEPT:
            raise cql.UserError(f"--per_trial {name}: one of {', '.join(cql.SWEPT)}")
    for name, value in flags.items():
        if str(value).startswith("["):  # cql.py leaves a text flag's as it stands
            flags[name] = yaml.safe_load(str(value))
    swept = [name for name, value in flags.items() if isinstance(value, list)]
    others = [name for name in swept if name not in (*cql.SWEPT, "env")]
    axes = {name: flags[name] for name in others}
    axes.update({name: flags[name] for name in cql.SWEPT if name in swept})
    split = [name for name in axes if name not in per_trial]
    trials = {}
    for number, values in enumerate(itertools.product(*axes.values())):
        run = dict(zip(axes, values))
        chosen = {name: run[name] for name in split}
        text = "-".join(f"{name}_{value}" for name, value in chosen.items()) or "all"
        name = re.sub(r"[^\w.+-]+", "_", text)
        if name not in trials:
            folder = directory / name
            command = without(argv, split)
            for flag, value in chosen.items():
                word = value if isinstance(value, str) else json.dumps(value)
                command.append(f"--{flag}={word}")
            command.append(f"--resume={folder}")
            cql.read_config(command)
            extra = {flag: run[flag] for flag in others}
            trials[name] = Trial(name, folder, command, [], extra)
        trials[name].numbers.append(number)
    return list(trials.values())


def end_with_parent() -> None:
    """Let the system end this process with the one that started it, whatever ends
    that; cql.py then saves first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Training(tune.Trainable):
    """A trial's process. Each result is its latest evaluation: step and mean score."""

    def setup(self, config, commands, root, caller):
        name = config["trial"]
        self.directory = root / name
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.directory / ".lock")
        with lock.acquire(timeout=120):  # until one of before has saved and ended
            pass
        self.output = root / f"{name}.log"
        with open(self.output, "ab") as log:
            self.process = subprocess.Popen(
                commands[name],
                cwd=caller,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent,
            )
        self.latest = {"step": 0, "score": math.nan}

    def step(self) -> dict:
        """The next evaluation; the latest again if there is none for two seconds, so
        that Tune can stop the trial in between."""
        waited = 0.0
        while waited < 2:
            status = self.process.poll()  # before the tables, which end before it does
            if self.read_next():
                return self.latest
            if status is not None:
                return self.ended(status)
            time.sleep(0.2)
            waited += 0.2
        return self.latest

    def read_next(self) -> bool:
        """Whether there is a further evaluation; it becomes the latest."""
        path = self.directory / "evaluations.csv"
        if not path.exists():
            return False
        scores = defaultdict(list)
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if None not in row.values():  # else it is still being written
                    score = row[SCORE] or row["return_mean"]
                    scores[int(row["step"])].append(float(score))
        for step in sorted(scores):
            if step > self.latest["step"]:
                mean = sum(scores[step]) / len(scores[step])
                self.latest = {"step": step, "score": mean}
                return True
        return False

    def ended(self, status: int) -> dict:
        """The last result. Raises RuntimeError where another try may help."""
        lines = self.output.read_text().splitlines()
        line = lines[-1] if lines else ""
        if status not in (0, 2, 3):
            raise RuntimeError(f"exit status {status}: {line}")
        return {**self.latest, "status": status, "line": line, "done": True}

    def cleanup(self) -> None:
        """Let it save, wherever it is."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


class StopAtBadInput(tune.Stopper):
    """Ends the sweep at an exit status of 2, which every other trial would have."""

    line = None

    def __call__(self, trial_id: str, result: dict) -> bool:
        if result.get("status") == 2:
            self.line = result["line"]
        return False

    def stop_all(self) -> bool:
        return self.line is not None


class Record(tune.Callback):
    """Notes how each trial ended, for the same command later on; says which is tried
    again."""

    def __init__(self, trials: Dict[str, Trial]):
        self.trials = trials

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:
        ended = self.trials[trial.config["trial"]]
        end = trial.last_result.get("status", STOPPED)
        if end != 2:
            text = json.dumps({"command": ended.command, "end": end})
            ended.record().write_text(text)

    def on_trial_recover(self, iteration, trials, trial, **info) -> None:
        name = trial.config["trial"]
        print(f"{name} broke off and goes on from its checkpoint ({name}.log)")


def connect(options) -> float:
    """Start Ray here, or join the cluster; returns the GPUs of a trial."""
    ray.init(
        address=options.address or "local",
        include_dashboard=None if options.address else False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    logging.getLogger("ray.tune").setLevel("CRITICAL")  # tracebacks of trials
    # Tune knows Ctrl-C's signal alone.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if options.gpus is not None:
        return options.gpus
    return min(1, ray.cluster_resources().get("GPU", 0))


def make_scheduler(config: cql.TrainConfig) -> ASHAScheduler:
    """Of the trials that reach a ninth, a third and all of the steps, a third goes
    on (ASHA, arXiv 1810.05934)."""
    total = config.max_timesteps + config.online_iterations
    return ASHAScheduler(
        time_attr="step",
        metric="score",
        mode="max",
        max_t=total + 1,  # the last step ends by itself
        grace_period=max(config.eval_freq, total // 9),
        reduction_factor=3,
    )


def run_trials(trials: List[Trial], options) -> Dict[str, str]:
    """Train these trials; returns what is wrong with those that failed for good, by
    name. Raises cql.UserError for bad input."""
    resources = {"cpu": options.cpus, "gpu": connect(options)}
    script = str(Path(cql.__file__).resolve())
    commands = {each.name: [sys.executable, script, *each.command] for each in trials}
    training = tune.with_parameters(
        Training, commands=commands, root=options.dir, caller=os.getcwd()
    )
    scheduler = None
    if options.asha:
        scheduler = make_scheduler(cql.read_config(trials[0].command))
    stopper = StopAtBadInput()
    columns = {"step": "step", "score": "score", "time_total_s": "seconds"}
    tuner = tune.Tuner(
        tune.with_resources(training, resources),
        param_space={"trial": tune.grid_search([each.name for each in trials])},
        tune_config=tune.TuneConfig(
            scheduler=scheduler, trial_name_creator=lambda trial: trial.trial_id
        ),
        run_config=tune.RunConfig(
            name=".ray",
            storage_path=str(options.dir),
            stop=stopper,
            failure_config=tune.FailureConfig(max_failures=TRIES_AGAIN),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[Record({each.name: each for each in trials})],
            progress_reporter=tune.CLIReporter(
                metric_columns=columns, max_report_frequency=30
            ),
            verbose=1,
        ),
    )
    results = tuner.fit()
    ray.shutdown()
    if stopper.line:
        raise cql.UserError(stopper.line.removeprefix("cql.py: error: "))
    failures = {}
    for result in results:
        if result.error:
            failures[result.config["trial"]] = str(result.error).splitlines()[-1]
    return failures


def join_tables(trials: List[Trial], name: str) -> pd.DataFrame:
    """A table of all trials, as texts, with runs numbered over the whole product."""
    parts = []
    for trial in trials:
        path = trial.directory / name
        if path.exists():
            part = pd.read_csv(path, dtype=str, keep_default_na=False)
            part["run"] = [trial.numbers[int(run)] for run in part["run"]]
            for flag, value in trial.extra.items():
                part[flag] = str(value)
            parts.append(part)
    if not parts:
        return pd.DataFrame()
    table = pd.concat(parts).fillna("")
    by_number = {"key": lambda column: column.astype(int), "kind": "stable"}
    return table.sort_values(["step", "run"], **by_number)


def summary(evaluations: pd.DataFrame, extra: List[str]) -> str:
    """Last and best evaluations, a line for each combination but of the seeds."""
    names = [*extra, *[name for name in cql.SWEPT if name != "seed"]]
    shown = [name for name in names if evaluations[name].nunique() > 1]
    column = SCORE if (evaluations[SCORE] != "").all() else "return_mean"
    evaluations = evaluations.assign(value=evaluations[column].astype(float))
    rows = []
    for _, run in evaluations.groupby("run", sort=True):
        row = {name: run[name].iloc[0] for name in shown}
        row["last step"] = int(run["step"].iloc[-1])
        row["last"] = run["value"].iloc[-1]
        row["last three"] = run["value"].iloc[-3:].mean()
        row["best"] = run["value"].max()
        rows.append(row)
    table = pd.DataFrame(rows)
    table["runs"] = 1
    means = {name: "mean" for name in ("last", "last three", "best")}
    together = {"runs": "sum", "last step": "min", **means}
    if not shown:
        shown = ["all"]
        table["all"] = "runs"
    table = table.groupby(shown, sort=False).agg(together).reset_index()
    text = table.to_string(index=False, float_format=lambda x: f"{x:.1f}")
    return f"{column}, means over the runs of a line:\n{text}"


def parse(argv: Optional[List[str]]) -> tuple:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="sweep.py --dir DIR [options] [flags of cql.py, lists are swept]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dir", type=Path, required=True, help="the sweep's directory")
    add("--per_trial", default="", help="swept flags, with commas, stacked in a trial")
    add("--cpus", type=float, default=1, help="of a trial (default: 1)")
    add("--gpus", type=float, help="of a trial, also parts (default: 1, if there are)")
    add("--address", help="a Ray cluster; auto: the one of this machine")
    add("--asha", action="store_true", help="stop trials whose last score is poor")
    return parser.parse_known_args(argv)


def sweep(options, argv: List[str]) -> int:
    """Returns the exit status. Raises cql.UserError."""
    options.dir = options.dir.absolute()
    per_trial = [name for name in options.per_trial.split(",") if name]
    trials = plan(argv, per_trial, options.dir)
    with cql.lock_directory(options.dir):
        failures = {}
        waiting = [trial for trial in trials if trial.end() is None]
        if waiting:
            failures = run_trials(waiting, options)
        for name in ("evaluations.csv", "metrics.csv"):
            table = join_tables(trials, name)
            if len(table):
                table.to_csv(options.dir / name, index=False, lineterminator="\n")
        evaluations = join_tables(trials, "evaluations.csv")
        if len(evaluations):
            print(summary(evaluations, list(trials[0].extra)))
    for name, error in failures.items():
        print(f"{name} failed {1 + TRIES_AGAIN} times: {error}; see {name}.log")
    ends = [trial.end() for trial in trials]
    print(f"files: {options.dir}")
    if failures:
        return 1
    if None in ends:
        print("interrupted; the same command goes on")
        return 130
    return 3 if 3 in ends else 0


def main(argv: Optional[List[str]] = None) -> int:
    options, rest = parse(argv)
    try:
        return sweep(options, rest)
    except cql.UserError as error:
        print("sweep.py: error:", error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there is a trial
        return 130


if __name__ == "__main__":
    sys.exit(main())
