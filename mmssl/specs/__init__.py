"""Every record a YAML file may contain: typed, frozen, unknown keys refused.

A run = towers + views + tasks + optimisation + data. `config.py` fills presets in and reports
misspelt keys; `build/` turns these records into modules.
"""

from mmssl.specs.base import Modality, Number, Schedule, Spec
from mmssl.specs.heads import (
    BilinearSpec,
    DistanceSpec,
    DotSpec,
    FusionSpec,
    HeadsSpec,
    JointScoreSpec,
    MapSpec,
    MatchScoreSpec,
    ScoreSpec,
    SpaceSpec,
)
from mmssl.specs.run import (
    DataSpec,
    OptimSpec,
    RunSpec,
    TrainSpec,
    TrunkSpec,
    ValidateSpec,
)
from mmssl.specs.tasks import (
    ClassifySpec,
    IdTargetSpec,
    InfoNCESpec,
    LabelSpec,
    MaskedSpec,
    MaskSpec,
    MatchSpec,
    MilNCESpec,
    PairObjective,
    PairSpec,
    PairsSpec,
    PatchTargetSpec,
    SigmoidSpec,
    TaskSpec,
)
from mmssl.specs.towers import (
    BackboneSpec,
    ConvAV8Spec,
    ConvSpec,
    CutSpec,
    EfficientNetSpec,
    EmbeddingSpec,
    FramesSpec,
    FrontendSpec,
    IdsSpec,
    JointSpec,
    PatchSpec,
    PositionSpec,
    SpectrumSpec,
    StemSpec,
    TowerSpec,
    Trainable,
    TransformerSpec,
    WaveSpec,
    WholeSpec,
)
from mmssl.specs.views import AugmentSpec, ViewSpec
