"""Train a product of flags as trials of Ray Tune, on one machine or a cluster.

    pip install -r requirements-sweep.txt
    python scripts/sweep.py --config_path configs/hopper.yaml \\
        --seed '[0,1,2,3]' --cql_alpha '[1,5,10,20]' --per_trial seed \\
        --gpus 0.25 --dir runs/sweep

A flag of cql.py that holds a list (of numbers, or of words such as penalty's)
is swept: there is a trial for each combination, but the values of the flags
that --per_trial names are trained together, stacked, in one trial (here four
trials of four seeds). Every other flag is cql.py's own. A trial is the ordinary
command `python cql.py ... --resume DIR/TRIAL`, run in the present directory.
One that is killed, or whose machine goes away, is tried again, three times at
most, and goes on from its last checkpoint. After Ctrl-C the same command goes
on as well.

On a cluster pass `--address auto`; DIR, this project and its Python must lie
under the same paths on every machine. In the end DIR holds evaluations.csv and
metrics.csv of the command's runs, numbered as if one process had trained them,
besides each trial's directory (DIR/TRIAL) and what it printed (DIR/TRIAL.log).

Exit status: 0 done, 1 a trial failed for good, 2 the input is at fault, 3 a
run diverged, 130 interrupted.
"""

import argparse
import csv
import ctypes
import itertools
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
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
    what = f"{missing}: pip install -r requirements-sweep.txt"
    print("sweep.py: error:", what, file=sys.stderr)
    sys.exit(2)

SCORE = "d4rl_normalized_score"
TRIES_AGAIN = 3
STOPPED = "stopped early"  # in place of an exit status
# Flags of text that are no lists to sweep.
WHOLE = "env eval_env name group project device checkpoints_path load_model".split()


@dataclass
class Trial:
    """One command of the sweep."""

    name: str
    directory: Path
    command: List[str]
    config: str  # what the command means, as JSON
    numbers: List[int]  # of its runs, in the whole product
    extra: Dict[str, object]  # swept flags that cql.py's tables do not hold

    def record(self) -> Path:
        """The file that tells how the trial ended."""
        return self.directory.with_name(self.name + ".json")

    def end(self, asha: bool = True):
        """Exit status of such a training, or STOPPED (which counts under ASHA alone);
        None if it is still to run."""
        if not self.record().exists():
            return None
        record = json.loads(self.record().read_text())
        if record["config"] != self.config or (record["end"] == STOPPED and not asha):
            return None
        return record["end"]

    def write_end(self, end) -> None:
        temporary = self.record().with_suffix(".tmp")
        temporary.write_text(json.dumps({"config": self.config, "end": end}))
        os.replace(temporary, self.record())


def without(argv: List[str], names) -> List[str]:
    """The command line without these flags and their values."""
    names = set(names)
    if "max_timesteps" in names:
        names.add("offline_iterations")
    kept = []
    dropping = False
    for argument in argv:
        if argument.startswith("--"):
            dropping = argument[2:].partition("=")[0] in names
        if not dropping:
            kept.append(argument)
    return kept


def with_flags(argv: List[str], flags: Dict[str, object]) -> List[str]:
    """The command line with these values in place of its own."""
    command = without(argv, flags)
    for name, value in flags.items():
        word = value if isinstance(value, str) else json.dumps(value)
        command.append(f"--{name}={word}")
    return command


def other_lists(argv: List[str]) -> Dict[str, list]:
    """The lists of flags that cql.py does not stack. Raises cql.UserError."""
    lists = {}
    for name, value in cql.read_command_line(argv).items():
        if name in WHOLE or name in cql.SWEPT or not str(value).startswith("["):
            continue
        if isinstance(value, str):  # cql.py leaves a text flag's as it stands
            with cql.errors_as(cql.UserError, f"--{name} {value}"):
                value = yaml.safe_load(value)
        values = [getattr(cql.make_config({name: each}), name) for each in value]
        if not values or len(set(values)) < len(values):
            raise cql.UserError(f"--{name} {value}: empty, or the same value twice")
        lists[name] = values
    return lists


def plan(argv: List[str], per_trial: List[str], directory: Path) -> List[Trial]:
    """The trials of cql.py's flags. Raises cql.UserError for what cql.py refuses."""
    if cql.read_command_line(argv).get("resume"):
        raise cql.UserError("--resume: every trial has its own, under --dir")
    for name in per_trial:
        if name not in cql.SWEPT:
            raise cql.UserError(f"--per_trial {name}: one of {', '.join(cql.SWEPT)}")
    axes = other_lists(argv)
    others = list(axes)
    first = {name: values[0] for name, values in axes.items()}
    whole = cql.read_config(with_flags(argv, first))
    for name in cql.SWEPT:
        values = getattr(whole, name)  # the command's, or a loaded model's
        if isinstance(values, list):
            axes[name] = values
    split = [name for name in axes if name not in per_trial]
    trials = {}
    for number, values in enumerate(itertools.product(*axes.values())):
        run = dict(zip(axes, values))
        chosen = {name: run[name] for name in split}
        words = [f"{key}_{value}".removesuffix(".0") for key, value in chosen.items()]
        name = "-".join(words) or "all"
        if name not in trials:
            folder = directory / name
            command = with_flags(argv, {**chosen, "resume": str(folder)})
            config = json.dumps(asdict(cql.read_config(command)))
            extra = {key: run[key] for key in others}
            trials[name] = Trial(name, folder, command, config, [], extra)
        trials[name].numbers.append(number)
    return list(trials.values())


def end_with_parent() -> None:
    """Let the system end this process with the one that started it, whatever ends
    that; cql.py then saves first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Training(tune.Trainable):
    """A trial's process. Each result is its latest evaluation: step and mean score."""

    def setup(self, config, commands, root, caller, environment):
        name = config["trial"]
        environment = dict(environment)
        for variable in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):  # Ray's share
            if variable in os.environ:
                environment[variable] = os.environ[variable]
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
                env=environment,
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
                    score = row[SCORE] or row["return_mean"] or "nan"
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
            ended.write_end(end)

    def on_trial_recover(self, iteration, trials, trial, **info) -> None:
        name = trial.config["trial"]
        print(f"{name} broke off and goes on from its checkpoint ({name}.log)")


def connect(options) -> dict:
    """Start Ray here, or join the cluster; returns what a trial takes of it. Raises
    cql.UserError where no machine has as much."""
    if options.address:
        print(f"joining Ray at {options.address}", flush=True)  # it may wait minutes
    with cql.errors_as(cql.UserError, f"--address {options.address}: no Ray there"):
        ray.init(
            address=options.address or "local",
            include_dashboard=None if options.address else False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    logging.getLogger("ray.tune").setLevel("CRITICAL")  # tracebacks of trials
    # Tune knows Ctrl-C's signal alone.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = max(machine.get("CPU", 0) for machine in machines)
    gpus = max(machine.get("GPU", 0) for machine in machines)
    if options.gpus is None:
        options.gpus = min(1, gpus)
    if options.cpus > cpus or options.gpus > gpus:
        what = f"--cpus {options.cpus:g} --gpus {options.gpus:g}"
        raise cql.UserError(f"{what}: a machine has {cpus:g} and {gpus:g} at most")
    return {"cpu": options.cpus, "gpu": options.gpus}


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
    resources = connect(options)
    script = str(Path(cql.__file__).resolve())
    commands = {each.name: [sys.executable, script, *each.command] for each in trials}
    training = tune.with_parameters(
        Training,
        commands=commands,
        root=options.dir,
        caller=os.getcwd(),
        environment=dict(os.environ),
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
    table["step"] = table["step"].astype(int)
    return table.sort_values(["step", "run"], kind="stable")


def summary(evaluations: pd.DataFrame, extra: List[str]) -> str:
    """Last and best evaluations, a line for each combination but of the seeds."""
    names = [*extra, *[name for name in cql.SWEPT if name != "seed"]]
    shown = [name for name in names if evaluations[name].nunique() > 1]
    column = "return_mean"
    if (evaluations[SCORE] != "").all():
        column = SCORE
    evaluations = evaluations.assign(value=pd.to_numeric(evaluations[column]))
    rows = []
    for _, run in evaluations.groupby("run", sort=True):
        row = {name: run[name].iloc[0] for name in shown}
        row["runs"] = 1
        row["last step"] = int(run["step"].iloc[-1])
        row["last"] = run["value"].iloc[-1]
        row["last three"] = run["value"].iloc[-3:].mean()
        row["best"] = run["value"].max()
        rows.append(row)
    table = pd.DataFrame(rows)
    if shown:
        groups = table.groupby(shown, sort=False)
    else:
        groups = table.groupby(lambda _: "all")
    means = groups[["last", "last three", "best"]].mean()
    counts = groups.agg({"runs": "sum", "last step": "min"})
    table = counts.join(means).reset_index()
    text = table.to_string(index=False, float_format=lambda x: f"{x:.1f}")
    return f"{column}, means over the runs of a line:\n{text}"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str):
        raise cql.UserError(message)


def parse(argv: Optional[List[str]]) -> tuple:
    """The options, and cql.py's flags. Raises cql.UserError."""
    parser = Parser(
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


def write_tables(trials: List[Trial], directory: Path) -> None:
    """Join evaluations.csv and metrics.csv, and print what they come to."""
    for name in ("metrics.csv", "evaluations.csv"):
        table = join_tables(trials, name)
        if len(table):
            table.to_csv(directory / name, index=False, lineterminator="\n")
    if len(table):
        print(summary(table, list(trials[0].extra)))


def sweep(options, argv: List[str]) -> int:
    """Returns the exit status. Raises cql.UserError."""
    options.dir = options.dir.absolute()
    per_trial = [name for name in options.per_trial.split(",") if name]
    trials = plan(argv, per_trial, options.dir)
    if (options.dir / "config.yaml").exists():
        raise cql.UserError(f"--dir {options.dir}: a run's, not a sweep's")
    failures = {}
    with cql.lock_directory(options.dir):
        waiting = [trial for trial in trials if trial.end(options.asha) is None]
        if waiting:
            shutil.rmtree(options.dir / ".ray", ignore_errors=True)  # of a call before
            failures = run_trials(waiting, options)
        write_tables(trials, options.dir)
    ends = [trial.end(options.asha) for trial in trials]
    for trial, end in zip(trials, ends):
        if end == 3:
            print(f"{trial.name}: a run diverged")
        elif end == STOPPED:
            print(f"{trial.name}: {STOPPED}")
    for name, error in failures.items():
        print(f"{name} failed {1 + TRIES_AGAIN} times: {error}; see {name}.log")
    print(f"files: {options.dir}")
    if failures:
        return 1
    if None in ends:
        print("interrupted; the same command goes on")
        return 130
    return 3 if 3 in ends else 0


def main(argv: Optional[List[str]] = None) -> int:
    try:
        options, rest = parse(argv)
        return sweep(options, rest)
    except cql.UserError as error:
        print("sweep.py: error:", error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there is a trial
        return 130


if __name__ == "__main__":
    sys.exit(main())
