"""A run that is trained from another one: by its flow, by its trajectories, or from its weights on.

    RUN2/                 a run like any other; its `parent` is the run that it was made from
    RUN2/trajectories/    what a neural operator learns from, where no others were named

Unlike a distillation in phases (`acceleration.distill`) there is one training, so that RUN2 is the run that is trained.
Consistency distillation (`scd`) and the neural operator (`dsno`) have a teacher, and are continued with it. Consistency
training (`sct`, `ect`) takes the weights of a run over, and is on its own from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from osmose.acceleration.trajectories import Trajectories, TrajectoriesConfig
from osmose.acceleration.trajectory_making import levels_of, make
from osmose.configuration import override
from osmose.data.dataset import Dataset
from osmose.errors import UserError, nearest
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.methods import METHODS, TAUGHT
from osmose.methods.base import GenerativeModel
from osmose.methods.chain import ChainModel, ProcessConfig
from osmose.methods.consistency import LOW_FREQUENCY, Consistency, ConsistencyConfig, TangentConfig
from osmose.methods.operator import DSNO, DSNOConfig
from osmose.methods.students import StudentConfig, Students
from osmose.training.config import Parent, RunConfig, TrainingConfig
from osmose.training.optimizers import suited_to
from osmose.training.progress import Progress, sampling_bar
from osmose.training.recipes import checked, spread, training_for
from osmose.training.run import Run, data_of, require_free, require_real
from osmose.training.trainer import Trainer, built

#: What the methods take over from the run that they begin with; a head may be changed.
_SAME = ("network", "schedule", "noise", "conditional")
#: What of the network may change besides.
_FREQUENCY = "network.time_frequency"
#: How many trajectories are made where nothing is said, and what of them can be said.
_NUM = 4000
_PREFIX = "trajectories."


def prepared(
    teacher: Run, out: Path | str, method: str, said: Mapping[str, Any], root: Path | None = None, resume: bool = False
) -> tuple[Teaching, Dataset]:
    """A run that is begun, or with `resume` found in its folder, and its data.

    Args:
        teacher: the run that it is made from.
        out: its folder.
        method: one of `TAUGHT` or `CONTINUED`.
        said: as for `taught_config`, and `trajectories`, the folder of those that a neural operator learns from.
        root: where the data lie, if not where the teacher found them.
        resume: go on with an interrupted one, by its own settings.

    Raises:
        UserError: anything in the input that is refused; nothing has been written then.
    """
    said = dict(said)
    given = said.pop("trajectories", None) if method == "dsno" else None
    trajectories = None if given is None else Path(given)
    if resume:
        for name in said:
            raise UserError(f"{name}: given, but {out} is continued by its own settings; resume without it")
        return Teaching.open(out, teacher, method, trajectories), data_of(teacher, root)
    require_free(Path(out))
    teacher.model()  # refuses a folder without weights, or with others
    dataset = data_of(teacher, root)
    said |= _stored(trajectories, teacher, said)
    config = taught_config(teacher.config, teacher.as_parent(), method, said, spread(dataset))
    return Teaching.begin(out, teacher, config, trajectories), dataset


def taught_config(
    teacher: RunConfig, parent: Parent, method: str, said: Mapping[str, Any], data_std: float
) -> RunConfig:
    """The configuration of a run that is made from another one.

    Args:
        teacher: the configuration of that run.
        parent: its name and hash.
        method: one of `TAUGHT` or `CONTINUED`.
        said: `steps`, `lr`, `seed`, dotted overrides of training (`training.batch_size`), of the method (`warmup`,
            `parametrization`), and of a neural operator's trajectories (`trajectories.num`).
        data_std: root mean square of the data in the model's units.

    Raises:
        UserError: anything that is refused; the message names the field.
    """
    origin = teacher.method
    if method == "dsno" and isinstance(origin, StudentConfig):
        origin = origin.model
    if not isinstance(origin, ProcessConfig) or origin.kind == "dsno":
        raise UserError(f"{origin.kind}: is no diffusion that {method} can begin with; ddpm, iddpm and edm are")
    if method in TAUGHT and isinstance(origin, ConsistencyConfig):
        raise UserError(f"{origin.kind}: is no diffusion with a flow to learn; ddpm, iddpm and edm are")
    require_real(origin, parent.folder, "teaches no student, which begins as it is")
    cls = METHODS.resolve(method)
    short = {"steps": "training.steps", "lr": "training.lr"}
    changes = {short.get(name, name): value for name, value in said.items() if name != "seed"}
    ours = {name: value for name, value in changes.items() if not name.startswith(("training.", _PREFIX))}
    for name in ours:
        field = name.split(".")[0]
        if field in _SAME and name != _FREQUENCY:
            raise UserError(f"{name}: is that of the run that {method} begins with, and cannot be changed")
        if field not in cls.model_fields:
            hint = nearest(field, [name for name in cls.model_fields if name not in _SAME])
            hint = f"did you mean 'training.{field}'?" if field in TrainingConfig.model_fields else hint
            raise UserError(f"{name}: unknown field; {hint}")
    training = {n.removeprefix("training."): v for n, v in changes.items() if n.startswith("training.")}
    suited = cls.training_recipe(teacher.spec) | suited_to(training)
    whole = override(training_for(teacher.spec, training.get("steps", suited.get("steps"))) | suited, training)
    steps = whole["steps"] if isinstance(whole["steps"], int) else 1
    values = cls.recipe(teacher.spec, data_std) | cls.length_recipe(steps)
    values |= {name: value for name, value in origin.to_json().items() if name in _SAME}
    if issubclass(cls, TangentConfig) and values["network"].get("time_frequency", 0.0) > LOW_FREQUENCY:
        values["network"]["time_frequency"] = LOW_FREQUENCY
    values["parametrization"] = _head(origin, cls, data_std, ours)
    if method == "dsno":
        values |= _trajectories(origin, ours, {n: v for n, v in changes.items() if n.startswith(_PREFIX)}, teacher)
    elif any(name.startswith(_PREFIX) for name in changes):
        raise UserError(f"trajectories: given, but {method} learns from none")
    values["kind"] = method
    made: dict[str, Any] = {"method": override(values, ours), "training": whole, "seed": said.get("seed", 0)}
    made |= {"versions": {}, "parent": parent.to_json()}
    try:
        config = checked(RunConfig.parse(teacher.to_json() | made))
    except UserError as error:  # what the file calls method.warmup is warmup in what is said
        raise UserError(str(error).removeprefix("method.")) from None
    if isinstance(config.method, DSNOConfig) and config.method.trajectories["num"] < config.training.batch_size:
        num, batch = config.method.trajectories["num"], config.training.batch_size
        raise UserError(
            f"trajectories.num: {num} is fewer than the {batch} of a batch; make more, or lower --batch-size"
        )
    return config


def _head(origin: ProcessConfig, cls: type, data_std: float, ours: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's own parametrization where the method can have it, so that its weights mean the same; else EDM's."""
    said = ours.get("parametrization", ours.get("parametrization.kind"))
    own = origin.parametrization
    preserving = origin.schedule.kind in ("linear", "cosine", "trig")
    bounded = own.kind == "edm" or (own.kind == "v" and preserving)
    kept = bounded or (not issubclass(cls, ConsistencyConfig) and own.kind != "eps")
    if kept and not (said == "edm" != own.kind):
        return own.to_json()
    return {"kind": "edm", "sigma_data": round(data_std, 3)}


def _trajectories(
    origin: ProcessConfig, ours: Mapping[str, Any], said: Mapping[str, Any], teacher: RunConfig
) -> dict[str, Any]:
    """Of a neural operator: its trajectories, and how its teacher samples where the two are compared."""
    given: dict[str, Any] = {"num": _NUM, "grid": ours.get("grid", "quadratic")}
    given |= {name.removeprefix(_PREFIX): value for name, value in said.items()}
    config = TrajectoriesConfig.suited(teacher, **given)
    if isinstance(teacher.method, StudentConfig):
        return {"trajectories": config.to_json(), "teacher_sampling": {"num_steps": config.num_steps}}
    spacing = "even" if origin.schedule.native_steps is None else "trailing"
    solver = {"kind": "ddim", "eta": 0.0} if config.solver == "ddim" else {"kind": "heun"}
    full = {"num_steps": config.num_steps, "spacing": spacing, "solver": solver, "clip": config.clip}
    return {"trajectories": config.to_json(), "teacher_sampling": full}


class Teaching:
    """A run that is begun, or about to begin, from another one.

    Attributes:
        run: the run that is trained.
        teacher: the run that it is made from.
        trajectories: of a neural operator, the folder with its trajectories.
    """

    def __init__(self, run: Run, teacher: Run, trajectories: Path | None):
        self.run, self.teacher = run, teacher
        self.trajectories = trajectories or run.folder / "trajectories"

    @classmethod
    def begin(cls, folder: Path | str, teacher: Run, config: RunConfig, trajectories: Path | None = None) -> Teaching:
        """Make a new run folder.

        Raises:
            UserError: something is there already, or trajectories do not fit, those that are to be made included.
        """
        require_free(Path(folder))
        if trajectories is not None:
            _begin(built(config), denoiser_of(teacher), Trajectories.open(trajectories, teacher))
        elif isinstance(model := built(config), DSNO):
            wanted = TrajectoriesConfig.parse(model.config.trajectories)
            model.columns(levels_of(teacher, wanted), wanted.num)
        return cls(Run.create(folder, config), teacher, trajectories)

    @classmethod
    def open(cls, folder: Path | str, teacher: Run, method: str, trajectories: Path | None = None) -> Teaching:
        """Go on with what is in a folder.

        Raises:
            UserError: another run, or one that was made from another teacher or by another method.
        """
        run = Run.open(folder)
        if run.config.method.kind != method:
            raise UserError(f"{folder}: was begun with {run.config.method.kind}, not with {method}")
        parent = run.config.parent
        if parent is None or parent.sha256 != teacher.hash():
            name = "another run" if parent is None else repr(parent.folder)
            raise UserError(f"RUN: {teacher.folder} is not what {folder} was made from, {name} (their weights differ)")
        return cls(run, teacher, trajectories)

    @property
    def finished(self) -> bool:
        """Whether the run is at its last step."""
        last = self.run.metrics()[-1:]
        return self.run.weights.is_file() and bool(last) and last[0]["step"] == self.run.config.training.steps

    @property
    def made(self) -> Run:
        """The run that is made, once it is finished."""
        return self.run

    def data_seconds(self) -> float:
        """What making its trajectories took; 0 where it learns from none."""
        path = self.trajectories / "trajectories.json"
        return Trajectories.open(self.trajectories).seconds if path.is_file() else 0.0

    def carry_out(self, dataset: Dataset, progress: bool = True) -> bool:
        """Do what is missing; False when a signal asked to stop before the end (the state is then saved).

        Raises:
            DivergedError: the loss is not finite.
            UserError: other data, or a full disk.
        """
        return self.finished or self.trainer(dataset, progress).fit()

    def trainer(self, dataset: Dataset, progress: bool = True) -> Trainer:
        """The training, ready to begin or to go on; weights that are taken over are in a checkpoint of the run then.

        Raises:
            UserError: other data, or a full disk.
        """
        model = built(self.run.config)
        paths = None
        if isinstance(model, DSNO):
            paths = self._paths(TrajectoriesConfig.parse(model.config.trajectories), progress)
        _begin(model, denoiser_of(self.teacher), paths)
        trainer = Trainer(self.run, dataset, model=model, progress=Progress(progress, self.run.config.method.kind))
        if trainer.step == 0:
            trainer.save()
        return trainer

    def _paths(self, wanted: TrajectoriesConfig, progress: bool) -> Trajectories:
        try:
            found = Trajectories.open(self.trajectories, self.teacher)
        except UserError:
            if self.trajectories != self.run.folder / "trajectories":
                raise
            resume = (self.trajectories / "trajectories.json").is_file()
            if not resume and any((self.run.folder / "checkpoints").glob("step_*")):
                raise UserError(
                    f"trajectories: those that {self.run.folder} was begun with lie elsewhere; name their folder"
                ) from None
            with sampling_bar("trajectories", progress) as on_step:
                return make(self.teacher, self.trajectories, wanted, resume=resume, on_step=on_step)
        if found.config != wanted:
            raise UserError(f"trajectories: {self.trajectories} are not those that {self.run.folder} was begun with")
        return found


def _stored(trajectories: Path | None, teacher: Run, said: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of trajectories by naming the folder where they are, for `taught_config`.

    Raises:
        UserError: the folder is damaged, incomplete or another teacher's, or something else is said of them besides.
    """
    if trajectories is None:
        return {}
    for name in said:
        if name.startswith(_PREFIX):
            raise UserError(f"{name}: given, but the trajectories of {trajectories} are made already")
    config = Trajectories.open(trajectories, teacher).config
    return {f"{_PREFIX}{name}": value for name, value in config.to_json().items()}


def _begin(model: GenerativeModel, denoiser: NetworkDenoiser, paths: Trajectories | None) -> None:
    """Give a model what it is taught by."""
    if isinstance(model, DSNO):
        assert paths is not None
        model.begin(denoiser, paths)
    else:
        assert isinstance(model, Consistency), "taught_config makes no others"
        model.begin(denoiser)


def denoiser_of(run: Run) -> NetworkDenoiser:
    """What a diffusion or a consistency model denoises with, or of students that with the most steps.

    Raises:
        UserError: a run without weights, or of another method.
    """
    model = run.model()
    if isinstance(model, Students):
        return model.student(max(model.grids))
    if not isinstance(model, ChainModel | Consistency):
        raise UserError(f"{run.folder}: a run of {run.config.method.kind} has no denoiser")
    return model.denoiser
