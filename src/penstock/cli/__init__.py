"""The `penstock` command. Each verb is one call of the library.

Data goes to standard output, messages to standard error. Exit codes: 0 done; 1 training failed;
2 something given cannot be; 3 a worker was lost (resumable); 130 interrupted (resumable).
"""

from __future__ import annotations

import importlib.resources
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cluster.local import warm
from penstock.errors import JobError, PenstockError, RunError
from penstock.runtime.preload import PRELOAD

if TYPE_CHECKING:
    from penstock.job import Job
    from penstock.runtime.evaluation import Evaluation
    from penstock.runtime.place import Spark
    from penstock.runtime.run import Run

__all__ = ["main"]

app = typer.Typer(
    name="penstock",
    help="Train one PyTorch model on many machines, with the same bits on however many.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="What to train and how.")]
RunDirectory = Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="In place of the file's; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def run(
    job_file: Annotated[
        Path | None,
        typer.Argument(metavar="JOB.yaml", help="What to train; with --resume the run's own."),
    ] = None,
    on: Annotated[
        str,
        typer.Option(
            help="Where: local (or local:PORT), a Spark master such as spark://host:7077, "
            "yarn or k8s://..., or a Connect server, sc://host:port."
        ),
    ] = "local",
    conf: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Of the Spark session; may be repeated."),
    ] = None,
    ship_environment: Annotated[
        bool,
        typer.Option(help="Send the nodes of a Spark cluster this whole Python environment."),
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.")] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on from this run's last checkpoint.")
    ] = None,
    run_dir: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="The run directory to make.")
    ] = None,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Write what each rank did and waited for, for Perfetto."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a job."""
    if on.startswith("local"):
        warm(PRELOAD)  # imports torch for the workers while this process does
    from penstock.job import Job
    from penstock.runtime.run import Run

    if job_file is None:
        if resume is None:
            raise JobError(
                "run: neither JOB.yaml nor --resume RUN", hint="penstock run examples/lenet.yaml"
            )
        job = Run(resume).job
    else:
        job = Job.from_yaml(job_file, overrides or [])
    _train(job, _place(on, conf or [], ship_environment), workers, resume, run_dir, as_json, trace)


def _place(on: str, conf: list[str], ship_environment: bool) -> str | Spark:
    if not conf and not ship_environment:
        return on
    from penstock.runtime.place import Spark

    for pair in conf:
        if "=" not in pair:
            raise JobError(
                f"--conf {pair}: expected KEY=VALUE", hint="--conf spark.executor.memory=4g"
            )
    if on.split(":")[0] == "local":
        raise JobError("--conf and --ship-environment are for Spark", hint="--on spark://host:7077")
    pairs = [pair.split("=", 1) for pair in conf]
    return Spark(on, dict(pairs), ship_environment)


@app.command()
def demo() -> None:
    """Train LeNet on 10,000 real digits with two workers on this machine."""
    warm(PRELOAD)
    from penstock.job import Job

    with importlib.resources.as_file(importlib.resources.files("penstock.demo")) as folder:
        job = Job.from_yaml(folder / "lenet.yaml")
    _train(job, "local", None, None, None, False)


@app.command()
def validate(job_file: JobFile, overrides: Overrides = None) -> None:
    """Check a job without training: the file, the data, one batch through the network."""
    from penstock.job import Job
    from penstock.runtime.check import check

    job = Job.from_yaml(job_file, overrides or [])
    for line in check(job):
        print(line)
    print(f"{job_file}: good", file=sys.stderr)


@app.command("plan")  # whose module has that name here
def plan_command(
    job_file: JobFile,
    on: Annotated[
        Path | None,
        typer.Option(metavar="CLUSTER.json", help="Required; penstock doctor --save makes one."),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(metavar="PARAMETER", help="Why it lies so, and what the next best costs."),
    ] = None,
    pins: Annotated[
        list[str] | None,
        typer.Option("--pin", metavar="NAME=S0", help="How a parameter or module is to lie."),
    ] = None,
    pipelines: Annotated[
        bool, typer.Option(help="Whether a step may be cut into the stages of a pipeline.")
    ] = True,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan there, as JSON.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a picture of it there, as HTML.")
    ] = None,
    diff: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="What another plan decides otherwise.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Decide how a job's step is split over a cluster, without running it."""
    from rich.console import Console

    from penstock.cli.plan import check_alone, check_writable, read_pins, show
    from penstock.job import Job
    from penstock.plan.picture import picture as drawn
    from penstock.plan.step import StepPlan
    from penstock.runtime.planning import explained, plan

    if on is None:
        raise JobError(
            "--on: no cluster is given to plan for",
            hint="penstock doctor --save cluster.json makes one of this machine",
        )
    check_writable({"--save": save, "--picture": picture})
    files = {"--save": save is not None, "--picture": picture is not None}
    if explain is not None:
        check_alone("--explain", {"--diff": diff is not None, "--json": as_json, **files})
    if diff is not None:
        check_alone("--diff", {"--json": as_json})
    pinned = read_pins(pins or [])
    other = None if diff is None else StepPlan.load(diff)
    job = Job.from_yaml(job_file, overrides or [])
    if explain is not None:
        for line in explained(job, on, explain, pins=pinned):
            print(line)
        return
    found = plan(job, on, pins=pinned, pipelines=pipelines)
    if other is not None:
        for line in (differences := list(other.differences(found))):
            print(line)
        if not differences:
            print(f"{diff} decides the same", file=sys.stderr)
    elif as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        show(found, Console())
    if save is not None:
        found.save(save)
    if picture is not None:
        try:
            picture.write_text(drawn(found))
        except OSError as error:
            raise RunError(
                f"--picture {picture}: {error}", hint="name a file that can be made"
            ) from error


@app.command()
def evaluate(run_directory: RunDirectory, as_json: AsJson = False) -> None:
    """Score a run's network on its job's test source."""
    from penstock.runtime.run import Run

    _print(Run(run_directory).evaluate(), as_json)


@app.command("doctor")  # whose module has that name here
def doctor_command(
    network: Annotated[
        bool,
        typer.Option("--network", help="Measure how fast processes of this machine talk instead."),
    ] = False,
    workers: Annotated[int, typer.Option(min=2, max=64, help="Processes, with --network.")] = 2,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Measure this machine, and write it there as a cluster to plan for; "
            "with --network: the links alone.",
        ),
    ] = None,
    hosts: Annotated[int, typer.Option(min=1, help="Of the cluster, all like this one.")] = 1,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Of each host: workers [default: 2], or GPUs.")
    ] = None,
    far_bandwidth: Annotated[
        str | None, typer.Option(metavar="10Gbit", help="Of a host's link to the others.")
    ] = None,
    far_latency: Annotated[
        str | None, typer.Option(metavar="50us", help="Between hosts [default: as within one].")
    ] = None,
    cuda: Annotated[bool, typer.Option("--cuda", help="Devices are GPUs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Examine this machine: what training needs, and the fix for each thing missing."""
    from rich.console import Console

    from penstock.cli.doctor import examine, show

    if network:
        _examine_network(workers, save, as_json)
        return
    if save is not None:
        from penstock.cli import hardware

        hardware.check_writable(save)
        cluster = hardware.measure(hosts, devices, far_bandwidth, far_latency, cuda=cuda)
        if as_json:
            print(json.dumps(cluster.to_json(), indent=1))
        else:
            hardware.show(cluster, Console())
        cluster.save(save)
        return
    findings = examine()
    if as_json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        show(findings, Console())
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)


def _examine_network(workers: int, save: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from penstock.cli import network

    found = network.measure(workers)
    if as_json:
        print(json.dumps({name: links.to_json() for name, links in found.items()}, indent=1))
    else:
        network.show(found, Console())
    if save is not None:
        try:
            save.write_text(json.dumps(network.for_planning(found).to_json(), indent=1))
        except OSError as error:
            raise RunError(
                f"--save {save}: {error}", hint="name a file that can be made"
            ) from error


def _train(
    job: Job,
    on: str | Spark,
    workers: int | None,
    resume: str | None,
    run_dir: str | None,
    as_json: bool,
    trace: bool = False,
) -> None:
    found: Run = job.run(on=on, workers=workers, resume=resume, run_dir=run_dir, trace=trace)
    result = found.result
    if result["stopped"]:
        print(f"stopped early: {result['stopped']}", file=sys.stderr)
    if found.evaluation is not None:
        _print(found.evaluation, as_json)
    print(
        f"run    {found.url}   {result['step']:,} steps in {result['seconds']:.1f} s, "
        f"the first after {result['seconds_to_first_step'] or 0:.1f} s\n"
        f"       penstock evaluate {found.url}\n"
        f"       tensorboard --logdir {found.url}"
        + (f"\n       open {found.url}/trace/rank-*.json in ui.perfetto.dev" if trace else ""),
        file=sys.stderr,
    )


def _print(evaluation: Evaluation, as_json: bool) -> None:
    print(json.dumps(evaluation.to_dict()) if as_json else evaluation)


def main() -> None:
    """The command's entry: errors of ours end in a message and a hint, not in a traceback."""
    try:
        app()
    except PenstockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        sys.exit(141)
