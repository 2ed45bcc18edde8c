"""Train a sweep over cql.py flags with Ray Tune, on one machine or a cluster.

    pip install -r requirements-sweep.txt
    python scripts/sweep.py --config_path configs/hopper.yaml \\
        --seed '[0,1,2,3]' --cql_alpha '[1,5,10,20]' --per_trial seed \\
        --gpus 0.25 --dir runs/sweep

A flag of cql.py whose value is a list (of numbers, or of words such as those of
--penalty) is swept: each combination of values is one trial. The values of the
flags named by --per_trial are stacked in one trial instead (here: four trials
of four seeds). All other flags are passed to cql.py. A trial is the ordinary
command `python cql.py ... --resume DIR/TRIAL`, run in the current directory. A
trial that is killed, or whose machine is lost, is retried at most three times
and continues from its last checkpoint. After Ctrl-C, run the same command again
to continue.

On a cluster, run `ray start --head --port=6379` on the first machine and
`ray start --address=FIRST_MACHINE:6379` on the others, then this script with
`--address auto` on the first; `ray stop` on each machine ends the cluster. DIR,
this project and its Python must have the same paths on every machine. Ray does
not authenticate, so use a private network. The results are DIR/evaluations.csv and
DIR/metrics.csv, in which runs are numbered as if one process had trained them
all. DIR/TRIAL is a trial's run directory and DIR/TRIAL.log its output.

Exit status: 0 done, 1 a trial failed after all retries or the disk failed, 2
invalid input, 3 a run diverged, 130 interrupted.
"""

import argparse
import csv
import ctypes
import hashlib
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cql

os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # cql.py writes the tables
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # print one table of all trials
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
MAX_RETRIES = 3
STOPPED = "stopped early"  # recorded instead of an exit status
# Text flags that are never swept: a list of env is one dataset.
NOT_SWEPT = "env eval_env name group project device checkpoints_path load_model".split()


@dataclass
class Trial:
    """One cql.py command of the sweep."""

    name: str
    directory: Path
    command: List[str]
    config: str  # cql.py's configuration for the command, as JSON
    numbers: List[int]  # index of each of its runs among all combinations
    extra: Dict[str, object]  # swept flags that are not columns of cql.py's tables

    def end_file(self) -> Path:
        """Return the path of the file that records how the trial ended."""
        return self.directory.with_name(self.name + ".json")

    def end(self, asha: bool = True):
        """Return how the trial ended: cql.py's exit status or STOPPED.

        Returns None if the trial has to run: it has not ended, it ended with another
        configuration, or ASHA stopped it and asha is now False."""
        if not self.end_file().exists():
            return None
        recorded = json.loads(self.end_file().read_text())
        if recorded["config"] != self.config:
            return None
        if recorded["end"] == STOPPED and not asha:
            return None
        return recorded["end"]

    def write_end(self, end) -> None:
        """Record how the trial ended: cql.py's exit status or STOPPED."""
        temporary = self.end_file().with_suffix(".tmp")
        temporary.write_text(json.dumps({"config": self.config, "end": end}))
        os.replace(temporary, self.end_file())


def remove_flags(argv: List[str], names) -> List[str]:
    """Return the command line without the named flags and their values."""
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


def replace_flags(argv: List[str], flags: Dict[str, object]) -> List[str]:
    """Return the command line with the given values of flags instead of its own."""
    command = remove_flags(argv, flags)
    for name, value in flags.items():
        word = value if isinstance(value, str) else json.dumps(value)
        command.append(f"--{name}={word}")
    return command


def unstacked_lists(argv: List[str]) -> Dict[str, list]:
    """Return the swept values of the flags that cql.py cannot stack.

    Raise UserError for an invalid, empty or repeated value."""
    lists = {}
    for name, value in cql.read_command_line(argv).items():
        if name in NOT_SWEPT or name in cql.SWEPT or not str(value).startswith("["):
            continue
        if isinstance(value, str):  # cql.py does not parse the list of a text flag
            with cql.errors_as(cql.UserError, f"--{name} {value}"):
                value = cql.read_yaml(value)
        values = [getattr(cql.make_config({name: each}), name) for each in value]
        if not values or len(set(values)) < len(values):
            problem = "the list is empty or repeats a value"
            raise cql.UserError(f"--{name} {value}: {problem}; pass distinct values")
        lists[name] = values
    return lists


def short_name(name: str) -> str:
    """Return the name, with its end replaced by a hash if it is long.

    A file name has at most 255 bytes, of which suffixes such as .json need some."""
    letters = name.encode()
    if len(letters) <= 200:
        return name
    digest = hashlib.sha256(letters).hexdigest()[:8]
    return letters[:200].decode(errors="ignore") + "-" + digest


def plan(argv: List[str], per_trial: List[str], directory: Path) -> List[Trial]:
    """Split the combinations of cql.py's flags into trials.

    Raise UserError for invalid flags."""
    if cql.read_command_line(argv).get("resume"):
        problem = "each trial has its own directory below --dir"
        raise cql.UserError(f"--resume: {problem}; leave --resume out")
    for name in per_trial:
        if name not in cql.SWEPT:
            choices = ", ".join(cql.SWEPT)
            problem = "cql.py cannot stack this flag"
            raise cql.UserError(f"--per_trial {name}: {problem}; choose from {choices}")
    axes = unstacked_lists(argv)
    unstacked = list(axes)
    first = {name: values[0] for name, values in axes.items()}
    config_of_first = cql.read_config(replace_flags(argv, first))
    cql.validate(config_of_first)
    for name in cql.SWEPT:
        values = getattr(config_of_first, name)  # from the command or a loaded model
        if isinstance(values, list):
            axes[name] = values
    split = [name for name in axes if name not in per_trial]
    trials = {}
    for number, values in enumerate(itertools.product(*axes.values())):
        run = dict(zip(axes, values))
        chosen = {name: run[name] for name in split}
        words = [f"{key}_{value}".removesuffix(".0") for key, value in chosen.items()]
        name = short_name("-".join(words) or "all")
        if name not in trials:
            folder = directory / name
            command = replace_flags(argv, {**chosen, "resume": str(folder)})
            config = cql.read_config(command)
            cql.validate(config)
            text = json.dumps(asdict(config))
            extra = {key: run[key] for key in unstacked}
            trials[name] = Trial(name, folder, command, text, [], extra)
        trials[name].numbers.append(number)
    return list(trials.values())


def terminate_with_parent() -> None:
    """Make Linux send this process SIGTERM when its parent ends for any reason.

    On SIGTERM cql.py saves a checkpoint."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Training(tune.Trainable):
    """Tune trainable that runs one cql.py process.

    Each result is an evaluation: its step and the mean score over the trial's runs."""

    def setup(self, config, commands, root, caller, environment):
        name = config["trial"]
        environment = dict(environment)
        # Ray sets these to the trial's share of the machine.
        for variable in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
            if variable in os.environ:
                environment[variable] = os.environ[variable]
        self.directory = root / name
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.directory / ".lock")
        # A process of an earlier try may still be saving its checkpoint.
        with lock.acquire(timeout=120):
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
                preexec_fn=terminate_with_parent,
            )
        self.latest = {"step": 0, "score": math.nan}

    def step(self) -> dict:
        """Wait for the next evaluation and return it.

        After two seconds without one, return the latest again, so that Tune can stop the
        trial."""
        waited = 0.0
        while waited < 2:
            # Polled before the table is read: an ended process has written all its rows.
            status = self.process.poll()
            if self.read_next():
                return self.latest
            if status is not None:
                return self.final_result(status)
            time.sleep(0.2)
            waited += 0.2
        return self.latest

    def read_next(self) -> bool:
        """Read the next evaluation into self.latest. Return False if there is none."""
        path = self.directory / "evaluations.csv"
        if not path.exists():
            return False
        scores = defaultdict(list)
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if None not in row.values():  # an incomplete row is still being written
                    score = row[SCORE] or row["return_mean"] or "nan"
                    scores[int(row["step"])].append(float(score))
        for step in sorted(scores):
            if step > self.latest["step"]:
                mean = sum(scores[step]) / len(scores[step])
                self.latest = {"step": step, "score": mean}
                return True
        return False

    def final_result(self, status: int) -> dict:
        """Return the trial's last result.

        Raise RuntimeError, after which Tune retries the trial, unless cql.py
        succeeded (0), refused its input (2) or diverged (3)."""
        lines = self.output.read_text().splitlines()
        line = lines[-1] if lines else ""
        if status not in (0, 2, 3):
            raise RuntimeError(f"exit status {status}: {line}")
        return {**self.latest, "status": status, "line": line, "done": True}

    def cleanup(self) -> None:
        """Stop the process with SIGTERM, so that it saves a checkpoint first."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


class StopAtBadInput(tune.Stopper):
    """Stopper that ends the sweep when a trial exits with status 2.

    Its input is invalid, and every other trial would fail in the same way."""

    line = None

    def __call__(self, trial_id: str, result: dict) -> bool:
        if result.get("status") == 2:
            self.line = result["line"]
        return False

    def stop_all(self) -> bool:
        return self.line is not None


class RecordEnds(tune.Callback):
    """Callback that records how each trial ended.

    The same command can then continue the sweep later. Prints a line when a trial is
    retried."""

    def __init__(self, trials: Dict[str, Trial]):
        self.trials = trials
        self.failed = []  # Tune's trials that failed after all retries

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:
        ended = self.trials[trial.config["trial"]]
        end = trial.last_result.get("status", STOPPED)
        if end != 2:  # invalid input is checked again by the next command
            ended.write_end(end)

    def on_trial_error(self, iteration, trials, trial, **info) -> None:
        self.failed.append(trial)

    def on_trial_recover(self, iteration, trials, trial, **info) -> None:
        name = trial.config["trial"]
        print(f"{name} failed; retrying from its last checkpoint (see {name}.log)")


def connect(options) -> dict:
    """Start Ray on this machine or join a cluster.

    Return the resources of one trial. Raise UserError if Ray is not found or no
    machine has these resources."""
    where = "cannot start Ray"
    if options.address:
        where = f"--address {options.address}: cannot connect to Ray"
        # Printed first, because a failing connection may wait for minutes.
        print(f"joining Ray at {options.address}", flush=True)
    with cql.errors_as(cql.UserError, where):
        ray.init(
            address=options.address or "local",
            include_dashboard=None if options.address else False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    logging.getLogger("ray.tune").setLevel("CRITICAL")  # hide tracebacks of trials
    # Tune handles SIGINT only.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = max(machine.get("CPU", 0) for machine in machines)
    gpus = max(machine.get("GPU", 0) for machine in machines)
    if options.gpus is None:
        options.gpus = min(1, gpus)
    if options.cpus == options.gpus == 0:
        raise cql.UserError("--cpus 0: a trial without a GPU needs a CPU; pass --cpus 1")
    if options.cpus > cpus or options.gpus > gpus:
        where = f"--cpus {options.cpus:g} --gpus {options.gpus:g}"
        found = f"a machine has at most {cpus:g} CPUs and {gpus:g} GPUs"
        raise cql.UserError(f"{where}: {found}; pass smaller numbers")
    return {"cpu": options.cpus, "gpu": options.gpus}


def make_scheduler(config: cql.TrainConfig) -> ASHAScheduler:
    """Make the ASHA scheduler (arXiv 1810.05934).

    At a ninth, a third and all of the steps, the third of the trials with the highest
    latest scores continues."""
    total = config.max_timesteps + config.online_iterations
    return ASHAScheduler(
        time_attr="step",
        metric="score",
        mode="max",
        max_t=total + 1,  # at the last step cql.py ends by itself
        grace_period=max(config.eval_freq, total // 9),
        reduction_factor=3,
    )


def run_trials(trials: List[Trial], options) -> Dict[str, str]:
    """Train the trials.

    Return the error of each trial that failed after all retries, by its name. Raises
    cql.UserError for invalid input."""
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
    ends = RecordEnds({each.name: each for each in trials})
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
            failure_config=tune.FailureConfig(max_failures=MAX_RETRIES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[ends],
            progress_reporter=tune.CLIReporter(
                metric_columns=columns, max_report_frequency=30
            ),
            verbose=1,
        ),
    )
    tuner.fit()
    ray.shutdown()
    if stopper.line:
        raise cql.UserError(stopper.line.removeprefix("cql.py: error: "))
    failures = {}
    for trial in ends.failed:
        failures[trial.config["trial"]] = str(trial.get_error()).splitlines()[-1]
    return failures


def join_tables(trials: List[Trial], name: str) -> pd.DataFrame:
    """Join the tables of this name of all trials.

    Cells are text, and runs are numbered over all combinations. The result is empty if
    no trial has the table."""
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
    """Return a table of the last and best evaluations as text.

    It has one row for each combination of the swept flags except seed, averaged over
    the runs of that combination."""
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
    return f"{column}, mean over the runs of each row:\n{text}"


class Parser(argparse.ArgumentParser):
    """Argument parser that raises UserError with one line, without the usage text."""

    def error(self, message: str):
        raise cql.UserError(message)


def parse(argv: Optional[List[str]]) -> tuple:
    """Return the parsed options and the list of cql.py's flags.

    Raise UserError for invalid options."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="sweep.py --dir DIR [options] [flags of cql.py; lists are swept]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dir", type=Path, required=True, help="directory of the sweep")
    text = "swept flags to stack in one trial, separated by commas"
    add("--per_trial", default="", help=text)
    add("--cpus", type=float, default=1, help="CPUs of a trial (default: 1)")
    text = "GPUs of a trial, also a fraction (default: 1 if the machine has one)"
    add("--gpus", type=float, help=text)
    add("--address", help="address of a Ray cluster; auto: the one of this machine")
    text = "stop trials early (ASHA) if their latest score is low"
    add("--asha", action="store_true", help=text)
    return parser.parse_known_args(argv)


def write_tables(trials: List[Trial], directory: Path) -> None:
    """Write the joined metrics.csv and evaluations.csv, and print a summary."""
    for name in ("metrics.csv", "evaluations.csv"):
        table = join_tables(trials, name)
        if len(table):
            table.to_csv(directory / name, index=False, lineterminator="\n")
    if len(table):  # the evaluations
        print(summary(table, list(trials[0].extra)))


def sweep(options, argv: List[str]) -> int:
    """Run or continue the sweep and return the exit status.

    Raise UserError for invalid input and cql.MachineError if the disk fails."""
    for name in ("cpus", "gpus"):
        number = getattr(options, name)
        if number is not None and not 0 <= number < math.inf:
            raise cql.UserError(f"--{name} {number:g}: must be finite and at least 0")
    options.dir = options.dir.absolute()
    with cql.errors_as(cql.UserError, f"--dir {options.dir}", OSError):
        holds_run = (options.dir / "config.yaml").exists()
    if holds_run:
        problem = "holds a run of cql.py, not a sweep"
        raise cql.UserError(f"--dir {options.dir}: {problem}; choose another directory")
    per_trial = [name for name in options.per_trial.split(",") if name]
    trials = plan(argv, per_trial, options.dir)
    failures = {}
    with cql.lock_directory(options.dir):
        waiting = [trial for trial in trials if trial.end(options.asha) is None]
        if waiting:
            # Delete what Tune wrote in an earlier command.
            shutil.rmtree(options.dir / ".ray", ignore_errors=True)
            failures = run_trials(waiting, options)
        where = f"cannot write the tables in {options.dir}"
        with cql.errors_as(cql.MachineError, where, OSError):
            write_tables(trials, options.dir)
    ends = [trial.end(options.asha) for trial in trials]
    for trial, end in zip(trials, ends):
        if end == 3:
            print(f"{trial.name}: a run diverged")
        elif end == STOPPED:
            print(f"{trial.name}: {STOPPED}")
    for name, error in failures.items():
        print(f"{name} failed {1 + MAX_RETRIES} times: {error}; see {name}.log")
    print(f"files: {options.dir}")
    if failures:
        return 1
    if None in ends:
        print("interrupted; run the same command to continue")
        return 130
    return 3 if 3 in ends else 0


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line and return its exit status."""
    try:
        options, rest = parse(argv)
        return sweep(options, rest)
    except cql.UserError as error:
        print("sweep.py: error:", error, file=sys.stderr)
        return 2
    except cql.MachineError as error:
        print("sweep.py: failed:", error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before Tune has started
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every name
    sys.exit(main())
