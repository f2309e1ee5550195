"""A run of a script: what it can be told, its folder, its log, its checkpoints, its end.

    1) options    the fields of a Config are the options of a command line, and what each may be
    2) files      a file is whole or not there; what a checkpoint must have
    3) devices    where a run computes, how much memory there is, which processes share it
    4) run        out/NAME, one process at a time; log.jsonl and ckpt.pt; signals let a step finish
    5) main       errors that a user can mend are one line and exit code 2

All scripts stand on this file, and it knows none of them. A folder holds a run once it has a checkpoint; a
killed run goes on from it with --resume, and its log is that of a run that was never stopped.
Does NOT include: tasks, models, what is trained or said. `python runs.py` is the smallest script: it fits a
line, is stopped, and goes on. Read first: nothing.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import shlex
import signal
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# 1) options


class UserError(Exception):
    """Something that the user can mend: printed as one line, exit code 2."""


def said_by(e):
    """An error of another library in a line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"


WHOLE = 2**31 - 1  # no whole number is larger, unless its option says so
SEEDS = 2**63 - 1
DEVICES = ("auto", "cpu", "cuda", "mps")


def option(default, text, group=None, least=None, most=None, choices=None, fixed=False, positional=False):
    """A field of a Config: what an option may be stands here; --help shows it, check_options holds to it.

    least, most: of a number; group: it begins a group of --help; fixed: a resumed run cannot change it;
    positional: it is given without its name.
    """
    allowed = f"at least {least}" if most is None else f"{least} to {most}"
    text += "" if least is None else f" ({allowed})"
    one = default[0] if isinstance(default, list) and default else default
    most = most or (WHOLE if isinstance(one, int) else math.inf)
    limits = {"least": least, "most": most, "allowed": allowed, "choices": choices}
    facts = {"help": text, "group": group, "fixed": fixed, "positional": positional, **limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=facts)
    return field(default=default, metadata=facts)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists the options)")


def flag(name):
    return "--" + name.replace("_", "-")


def listed(values):
    return ", ".join(f"{name} {value}" for name, value in values.items())


def parse(argv, config, presets, script, doc):
    """Command line -> (config, the options that were given). Explicit options win over the preset."""
    lines = [f"  {name:6} {listed(values) or 'the defaults'}" for name, values in presets.items()]
    parser = Parser(
        prog=script,
        usage=f"python {script} [options]",
        description="\n\n".join(doc.split("\n\n")[:2]),  # the title and the commands
        epilog="\n".join(["presets:", *lines]) if presets else None,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if presets:
        small = {"action": "store_const", "const": "small", "help": "= --preset small"}
        parser.add_argument("--small", dest="preset", **small)
    group = parser
    kinds = {bool: {"action": argparse.BooleanOptionalAction}}
    for f in dataclasses.fields(config):
        facts = f.metadata
        if facts["group"]:
            group = parser.add_argument_group(facts["group"])
        if f.type is list:
            kind = {"nargs": "+", "type": type(f.default_factory()[0]) if f.default_factory() else str}
        else:
            kind = kinds.get(f.type, {"type": f.type, "choices": facts["choices"]})
        default = "" if f.type in (bool, list) or facts["positional"] else f" [{f.default}]"
        place = parser if f.name == "preset" else group
        place.add_argument(
            f.name if facts["positional"] else flag(f.name), **kind, help=facts["help"] + default
        )
    given = vars(parser.parse_args(argv))
    cfg = config(**{**presets.get(given.get("preset", "base"), {}), **given})
    check_options(cfg)
    return cfg, given


def check_options(cfg):
    """UserError where an option is not what its definition allows."""
    for f in dataclasses.fields(cfg):
        values = getattr(cfg, f.name)
        facts = f.metadata
        if facts["choices"] and values not in facts["choices"]:
            raise UserError(f"{flag(f.name)} {values}: there is only {', '.join(facts['choices'])}")
        if facts["least"] is None:
            continue
        for value in values if f.type is list else [values]:
            finite = isinstance(value, (int, float)) and math.isfinite(value)
            if not finite or value < facts["least"]:
                raise UserError(f"{flag(f.name)} must be {facts['allowed']}, not {value}")
            if value > facts["most"]:
                raise UserError(f"{flag(f.name)} must be at most {facts['most']}, not {value}")


def usual(cfg, presets, free, **more):
    """Whether a run has its preset's own settings, but for the options in `free`."""
    own = {**dataclasses.asdict(type(cfg)()), **presets[cfg.preset], **more}
    return all(getattr(cfg, name) == value for name, value in own.items() if name not in free)


# ------------------------------------------------------------------------------------------------------------
# 2) files


@contextlib.contextmanager
def whole_file(path):
    """Write another file, then rename it: the path always holds a whole file, old or new.

    UserError if that fails: nothing is left then but what was there before.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        reason = e.__context__ if isinstance(e, RuntimeError) else e  # torch has an error of its own
        if not isinstance(reason, OSError):
            raise
        place = os.path.dirname(path)
        raise UserError(f"cannot write to {place}: {reason.strerror}; what was there is untouched") from e


def save_checkpoint(path, state):
    with whole_file(path) as f:
        torch.save(state, f)


def load_checkpoint(path, needs=(), device="cpu"):
    """-> the saved dict, which has what is needed; UserError if there is none, or it is torn or another's."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no checkpoint")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch does not look at checksums
        saved = None if damaged else torch.load(path, map_location=device, weights_only=True)
        lacks = [name for name in needs if name not in saved]
    except Exception as e:  # a torn file raises many kinds
        raise UserError(f"{path}: not a readable checkpoint ({type(e).__name__})") from e
    if lacks:
        raise UserError(f"{path}: the checkpoint of something else, without {', '.join(lacks)}")
    return saved


GONE = {"compile"}  # options of earlier versions, which changed no result


def config_of(saved, config, path):
    """The config of a checkpoint; UserError if a script of another kind or age has written it."""
    fields = {f.name: f.type for f in dataclasses.fields(config)}
    found = saved["config"]
    if not isinstance(found, dict) or not found or set(found) - set(fields) - GONE:
        raise UserError(f"{path}: the checkpoint of another script, or of another version of this one")
    found = {name: value for name, value in found.items() if name not in GONE}
    kinds = [isinstance(value, (fields[name], int)) for name, value in found.items()]
    kinds += [isinstance(saved["step"], int), isinstance(saved.get("seconds", 0.0), float)]
    if not all(kinds):
        raise UserError(f"{path}: the checkpoint has values of a wrong kind")
    cfg = config(**found)
    if hasattr(cfg, "upgrade"):
        cfg.upgrade(found)
    return cfg


def load_state(folder, target, state):
    """target.load_state_dict(state); UserError if the run in `folder` has another shape."""
    try:
        target.load_state_dict(state)
        for p, own in getattr(target, "state", {}).items():  # of an optimizer, which does not look itself
            own["exp_avg"] + own["exp_avg_sq"] + p
    except Exception as e:  # what is no state at all raises many kinds
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{folder}: the checkpoint is of another shape ({reason})") from e


# ------------------------------------------------------------------------------------------------------------
# 3) devices and processes


def pick_device(cfg):
    """-> the torch.device of --device: torch's current GPU, under torchrun one for each process."""
    if cfg.device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: this computer has none that torch can use")
        return torch.device("mps")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this computer has no GPU that torch can use; leave the option away")
    if cfg.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    if number >= torch.cuda.device_count():
        raise UserError(f"{number + 1} processes here, but only {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def peak_memory(device):
    """Bytes that torch had allocated on a GPU; on a CPU those that the process had (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":  # has no module `resource`
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory(device):
    """Bytes that a device has; infinitely many where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def processes(device):
    """Under torchrun: meet the other processes -> (which one this is, how many there are)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        patience = datetime.timedelta(days=1)  # the others wait while process 0 makes tokens of all texts
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return int(os.environ.get("RANK", "0")), world


def shared(work, rank, world):
    """Process 0 works, all get what comes of it; a UserError ends all, and process 0 says it."""
    found = [None, None]  # the result, the error
    if rank == 0:
        try:
            found[0] = work()
        except UserError as e:
            found[1] = e
    if world > 1:
        dist.broadcast_object_list(found)
    if found[1]:
        raise found[1] if rank == 0 else SystemExit(2)
    return found[0]


# ------------------------------------------------------------------------------------------------------------
# 4) run


def say(*lines, end="\n"):
    """Print, above a progress bar if there is one. Whatever happens to the screen, the run goes on."""
    text = "\n".join(lines)
    try:
        code = getattr(sys.stdout, "encoding", None) or "utf-8"  # of some terminals it is ascii
        tqdm.write(text.encode(code, errors="backslashreplace").decode(code), end=end)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has ended; what Python still has to write goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # a full disk behind `>`; stdout is closed
        pass


def check_finite(where, **values):
    """Before a step is taken, and before it is saved: FloatingPointError if a number is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"the {name} is {value} {where}; a lower learning rate may help")


def norm_of(model):
    """-> the sum of the norms of its weights: not finite if one of them is not."""
    return torch.stack(torch._foreach_norm(list(model.parameters()))).sum().item()


LOCKS = []  # open files, of the folders that are this process's own


def claim(folder):
    """Make a folder this process's own -> whether no other process has it.

    However a process ends, its lock ends too. Windows has no such locks; nothing is refused there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        return False
    LOCKS.append(lock)
    return True


def run_folder(cfg, base):
    """-> out/NAME (default: `base`, numbered): a new folder, or with --resume the latest run; now our own.

    A folder holds a run once it has a checkpoint: what fails before can be begun again by the same name.
    """
    names = [cfg.name] if cfg.name else [base, *(f"{base}-{i}" for i in range(2, 1000))]
    folders = [pathlib.Path(cfg.out, name) for name in names]
    runs = [folder for folder in folders if os.path.exists(folder / "ckpt.pt")]
    if cfg.resume and not runs:
        raise UserError(f"--resume: there is no run in {folders[0]}")
    if runs == folders and not cfg.resume:
        raise UserError(f"{folders[-1]} holds a run already: --resume continues, another --name starts anew")
    for folder in runs[-1:] if cfg.resume else [folder for folder in folders if folder not in runs]:
        try:
            if claim(folder):
                return folder
        except OSError as e:
            raise UserError(f"cannot write to {folder}: {e.strerror}") from e
    raise UserError(f"{folder}: another process is at work there")


def open_run(cfg, given, base, validate, rank=0, world=1):
    """Begin a run, or go on with one -> (Run, its checkpoint or None); UserError if that cannot be.

    A resumed run keeps its options, except for those given now. `validate` comes before anything is written.
    """
    if not cfg.resume:
        validate(cfg)
    folder = shared(lambda: run_folder(cfg, base), rank, world)
    if not cfg.resume:
        return Run(cfg, folder, rank), None
    path = folder / "ckpt.pt"
    saved = load_checkpoint(path, ("model", "optimizer", "step", "seconds", "config"))
    old = dataclasses.asdict(config_of(saved, type(cfg), path))
    for f in dataclasses.fields(cfg):
        if f.metadata["fixed"] and given.get(f.name, old[f.name]) != old[f.name]:
            raise UserError(f"{folder}: the checkpoint has {flag(f.name)} {old[f.name]}, not {given[f.name]}")
    cfg = type(cfg)(**{**old, **given})
    validate(cfg)
    if cfg.steps < saved["step"]:
        raise UserError(f"{folder}: the checkpoint is at step {saved['step']}, beyond --steps {cfg.steps}")
    return Run(cfg, folder, rank, saved["step"], saved["seconds"], resumed=True), saved


class Run:
    """A run's folder, how far it is, and whether a signal asks it to stop. Only rank 0 writes and prints."""

    def __init__(self, cfg, folder, rank=0, step=0, seconds=0.0, resumed=False):
        self.cfg = cfg
        self.folder = folder
        self.rank = rank
        self.step = step  # finished steps
        self.seconds = seconds  # of all of them
        self.resumed = resumed
        self.timed = []  # seconds of each step of this process
        self.signals = []  # that ask it to stop

    def say(self, *lines):
        if self.rank == 0:
            say(*lines)

    def record(self, **entry):
        """Write a line of the log."""
        if self.rank > 0:
            return
        short = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in entry.items()}
        try:
            with open(self.folder / "log.jsonl", "a") as f:
                f.write(json.dumps({"step": self.step, **short}) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {self.folder / 'log.jsonl'}: {e.strerror}") from e

    def trim_log(self):
        """Leave what a resumed run logged until its checkpoint; what came after, or is torn, comes again."""
        lines = []
        path = self.folder / "log.jsonl"
        if self.resumed and path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
        kept = []
        for line in lines:
            try:
                entry = json.loads(line)
                again = "options" in entry and entry["step"] == self.step  # the header, of a resumption here
                if line.endswith(b"\n") and entry["step"] <= self.step and "final" not in entry and not again:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # bytes that are no entry
                self.say(f"note     a line of {path} that cannot be read is left out")
        with whole_file(path) as f:
            f.write(b"".join(kept))

    def header(self, hardware, *lines, **facts):
        """What somebody needs to judge or repeat the run, on the screen and in the log."""
        if self.rank == 0:
            self.trim_log()
        default = type(self.cfg)()
        options = {k: v for k, v in dataclasses.asdict(self.cfg).items() if v != getattr(default, k)}
        self.say(
            f"run      {self.folder}" + (f", resumed at step {self.step}" if self.resumed else ""),
            *lines,
            f"options  {listed(options) or 'all defaults'}",
            f"on       {hardware}, torch {torch.__version__}",
        )
        self.record(**facts, hardware=hardware, torch=torch.__version__, options=options)

    def catch_signals(self):
        """From here on a signal lets the step finish."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self.signals.append(number))

    def advance(self, seconds):
        """A step is finished; it took so long."""
        self.step += 1
        self.seconds += seconds
        self.timed.append(seconds)

    def due(self, every):
        return self.step % every == 0 or self.step == self.cfg.steps

    @property
    def pace(self):
        """Seconds of a step: the median of the last 50, without the first; None after one step."""
        return float(np.median(self.timed[1:][-50:])) if len(self.timed) > 1 else None

    def progress(self, line, tokens=0):
        """tokens: of a step."""
        if self.pace is None:
            rest = f"{self.timed[0]:.1f} s, with what a first step prepares"
        else:
            speed = f"{1e3 * self.pace:.0f} ms | {tokens / self.pace / 1e3:.1f}k tok/s | " if tokens else ""
            rest = f"{speed}eta {self.pace * (self.cfg.steps - self.step) / 60:.1f} min"
        self.say(f"step {self.step:5d}/{self.cfg.steps} | {line} | {rest}")

    def check_finite(self, **values):
        check_finite(
            f"after step {self.step}: nothing saved since the last checkpoint in {self.folder}", **values
        )

    def save(self, model, optimizer, **more):
        """Replace the checkpoint, but never by one with broken weights."""
        self.check_finite(**{"norm of the weights": norm_of(model)})
        own = {"step": self.step, "seconds": self.seconds, "config": dataclasses.asdict(self.cfg)}
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more, **own}
        if self.rank == 0:
            save_checkpoint(self.folder / "ckpt.pt", state)

    # The last words of a run -> its exit code

    def stopped(self):
        out = f"--out {shlex.quote(self.cfg.out)} " if self.cfg.out != type(self.cfg).out else ""
        name = shlex.quote(self.cfg.name or self.folder.name)
        self.say(f"stopped  by a signal at step {self.step}, saved; --resume {out}--name {name} continues")
        return 128 + (self.signals or [signal.SIGTERM])[0]  # or another process got one

    def finished(self, *lines, ok, **facts):
        """ok: whether the result is what was expected; None: nothing was."""
        self.record(final=True, seconds=self.seconds, ok=ok, **facts)
        self.say(*lines)
        return 1 if self.cfg.check and ok is False else 0


# ------------------------------------------------------------------------------------------------------------
# 5) main


def main(argv, work, **how):
    """Parse the command line (None: this process's; how: see parse), work(cfg, given) -> exit code."""
    try:
        return work(*parse(sys.argv[1:] if argv is None else argv, **how))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:  # a step, or a model, whose numbers are not finite
        say(f"stopped  {e}")
        return 1
    except KeyboardInterrupt:  # before the first step; later a signal saves first
        print("stopped  before the first step", file=sys.stderr)
        return 130
    except (OSError, MemoryError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in reason:
            reason = "the memory is full: a smaller batch (--micro) or model needs less"
        elif not isinstance(e, OSError):
            raise
        print(f"error: {reason}", file=sys.stderr)
        return 2
    finally:
        while LOCKS:
            LOCKS.pop().close()
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------
# `python runs.py`: the smallest script


@dataclass
class Demo:
    steps: int = option(8, "steps", least=0)
    stop: int = option(0, "a signal comes after this step; 0: none", least=0)
    out: str = option("out", "folder of all runs")
    name: str = option("line", "the run's folder in it")
    resume: bool = option(False, "go on")
    check: bool = option(False, "exit with 1 if the line is not found")


def fit(cfg, given):
    """y = w x, w = 3, by gradient descent."""
    run, saved = open_run(cfg, given, "line", check_options)
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    if saved:
        load_state(run.folder, model, saved["model"])
        load_state(run.folder, optimizer, saved["optimizer"])
    run.header("CPU")
    if not saved:
        run.save(model, optimizer)
    run.catch_signals()
    while run.step < run.cfg.steps:
        loss = ((model.weight - 3) ** 2).sum()
        loss.backward()
        run.check_finite(loss=loss.item())
        optimizer.step()
        optimizer.zero_grad()
        run.advance(1e-3)
        run.record(loss=loss.item())
        run.progress(f"loss {loss:.3f} | w {model.weight.item():.2f}")
        if run.step == cfg.stop:
            signal.raise_signal(signal.SIGTERM)  # as `kill` would
        run.save(model, optimizer)
        if run.signals:
            return run.stopped()
    return run.finished(f"w is {model.weight.item():.2f}", ok=abs(model.weight.item() - 3) < 0.1)


if __name__ == "__main__":
    about = dict(config=Demo, presets={}, script="runs.py", doc=__doc__)
    if sys.argv[1:]:
        sys.exit(main(None, fit, **about))
    with tempfile.TemporaryDirectory() as folder:
        main(["--out", folder, "--stop", "4"], fit, **about)
        main(["--out", folder, "--resume"], fit, **about)
