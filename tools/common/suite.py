"""Tasks of the suite: models, data, lengths, and the optimizers that are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .contestants import ATTACH, BOXES, DECAY, DECAYS, TOP_1, Contestant, Model
from .turns import TURN_SCRIPT

FIRST_ORDER = ('SGD', 'AdamW')
#: Optimizers of torch and pytorch_optimizer, which every task compares with ours.
EXTERNAL = (
    *FIRST_ORDER,
    'pytorch_optimizer.Muon',
    'pytorch_optimizer.SOAP',
    'pytorch_optimizer.ScalableShampoo',
)
_SETTING = 'optim_wrapper.optimizer.'
#: Settings of pytorch_optimizer's SOAP and Shampoo: a refresh every ten steps, as ours. Its class
#: Shampoo, which has no grafting, ended in non-finite statistics after ten steps at every rate.
PEER_OPTIONS: dict[str, dict[str, Any]] = {
    'pytorch_optimizer.SOAP': {f'{_SETTING}precondition_frequency': 10},
    'pytorch_optimizer.ScalableShampoo': {
        f'{_SETTING}preconditioning_compute_steps': 10,
        f'{_SETTING}start_preconditioning_step': 10,
    },
}
#: Muon, and its rate for the parameters that are no matrices.
MUON, MUON_REST = 'pytorch_optimizer.Muon', f'{_SETTING}adamw_lr'
#: Learning rates to screen; more follow where the best is at an edge.
RATES = {
    'pytorch_optimizer.Muon': (2e-3, 6e-3, 0.02, 0.06),
    'pytorch_optimizer.ScalableShampoo': (0.01, 0.03, 0.1, 0.3),
    'sgd': (0.01, 0.03, 0.1, 0.3),
    'adam': (3e-4, 1e-3, 3e-3, 0.01),
}
#: Share of the iterations in which the rate rises.
WARM_UP = 0.05


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of the suite.

    Attributes:
        name: Name on the command line.
        model: Config, metrics and data; its optimizers are those of `contestants`.
        iterations: Length of a whole run; a screening takes a quarter.
        images: Images for training.
        ours: Optimizers of this package.
        rest: More of them; the best one in the screening takes part.
        evaluations: Evaluations of a run.
        rest_rate: Muon's rate for the parameters that are no matrices.
        whole_seeds: Seeds of the runs of equal iterations; those of equal seconds have all.
    """

    name: str
    model: Model
    iterations: int
    images: int
    ours: tuple[str, ...]
    rest: tuple[str, ...]
    evaluations: int = 10
    rest_rate: float | None = None
    whole_seeds: int = 1

    @property
    def contestants(self) -> tuple[str, ...]:
        """Names of all optimizers."""
        return (*EXTERNAL, *self.ours)

    @property
    def prepared(self) -> Model:
        """The model, whose optimizers have the suite's settings."""
        names = (*self.contestants, *self.rest)
        return replace(self.model, contestants={name: self.contestant(name) for name in names})

    def contestant(self, name: str) -> Contestant:
        """Training settings of an optimizer but its rate."""
        known = self.model.contestant(name)
        options = {**known.options, **PEER_OPTIONS.get(name, {})}
        if name != MUON:
            return replace(known, options=options)
        if self.rest_rate is not None:
            options[MUON_REST] = self.rest_rate
        return replace(known, options=options, script=TURN_SCRIPT)

    def rates(self, name: str) -> tuple[float, ...]:
        """Learning rates to screen."""
        kind = 'adam' if self.contestant(name).adaptive else 'sgd'
        return RATES.get(name, RATES[kind])


def schedule(iterations: int) -> dict[str, int]:
    """Settings for a warm-up and a cosine schedule of some length."""
    warm = max(1, round(WARM_UP * iterations))
    return {
        'param_scheduler.0.end': warm,
        'param_scheduler.1.begin': warm,
        'param_scheduler.1.T_max': iterations - warm,
        'param_scheduler.1.end': iterations,
    }


def _model(title: str, config: str, plain: str, metrics: dict[str, str], data: str) -> Model:
    """Model for a config of configs/suite; `plain` is the config's own optimizer."""
    path = f'../suite/{config}'
    adaptive = plain == 'AdamW'
    base = Contestant(path, 0.0, options={DECAY: DECAYS[adaptive]}, adaptive=adaptive)
    attached = {
        'AFOpt+NKFAC': replace(base, arguments=('--optimizer', 'AdamW', ATTACH, 'AFOpt+NKFAC'))
    }
    return Model(
        title=title,
        plain=plain,
        contestants={plain: base, **(attached if adaptive else {})},
        metrics=metrics,
        data=data,
    )


CONVOLUTIONS = ('NKFAC', 'FAdam', 'AdaNKFAC', 'SOAP')
ATTENTION = ('AdaNKFAC', 'FAdam', 'AFOpt+NKFAC', 'SOAP')
#: Optimizers of which the best one in the screening takes part.
REST, ATTENTION_REST = ('AdamR', 'ARO', 'SKFAC'), ('AdamR', 'ARO', 'AdaAFOpt')
_ALL = (
    Task(
        name='digits-cls',
        model=_model('ResNet-18, digits', 'resnet_digits', 'SGD', TOP_1, 'digits-cls'),
        iterations=300,
        images=4000,
        ours=CONVOLUTIONS,
        rest=REST,
        whole_seeds=3,
    ),
    Task(
        name='swin-digits-cls',
        model=_model('Swin, digits', 'swin_digits', 'AdamW', TOP_1, 'digits-cls'),
        iterations=800,
        images=4000,
        # At equal iterations ARO leads AdamR, at equal seconds AdamR leads ARO.
        ours=(*ATTENTION, 'AdamR'),
        rest=('ARO', 'AdaAFOpt'),
        whole_seeds=3,
    ),
    Task(
        name='shapes',
        model=_model('Faster R-CNN, shapes', 'faster-rcnn_shapes', 'SGD', BOXES, 'shapes'),
        iterations=800,
        images=400,
        ours=CONVOLUTIONS,
        rest=REST,
    ),
    Task(
        name='digits',
        model=_model(
            'Faster R-CNN, digits in photographs', 'faster-rcnn_digits', 'SGD', BOXES, 'digits'
        ),
        iterations=1000,
        images=800,
        ours=CONVOLUTIONS,
        rest=REST,
    ),
    Task(
        name='swin',
        model=_model('Swin Mask R-CNN, shapes', 'mask-rcnn_shapes', 'AdamW', BOXES, 'shapes'),
        iterations=800,
        images=400,
        ours=ATTENTION,
        rest=ATTENTION_REST,
    ),
)
#: Tasks by name, the cheap ones first.
TASKS = {task.name: task for task in _ALL}
