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
    MatchMapSpec,
    MatchScoreSpec,
    ScoreSpec,
    SpaceSpec,
)
from mmssl.specs.networks import (
    ConvAV8Spec,
    ConvSpec,
    EfficientNetSpec,
    ResNet18Spec,
    ResNetSpec,
    S3DGSpec,
    SpeechConvSpec,
    VGG16Spec,
)
from mmssl.specs.quantizers import GumbelSpec, NearestSpec, QuantizerSpec
from mmssl.specs.run import (
    DataSpec,
    OptimSpec,
    RunSpec,
    TrainSpec,
    TrunkSpec,
    ValidateSpec,
)
from mmssl.specs.stages import LabellingSpec, LabelStageSpec, StagesSpec
from mmssl.specs.targets import (
    CodeTargetSpec,
    FrameTargetSpec,
    FrequencyBandSpec,
    IdTargetSpec,
    LatentTargetSpec,
    MagnitudeNoiseSpec,
    PatchTargetSpec,
    PredictiveTargetSpec,
    ReplacedTargetSpec,
    SpecMasksSpec,
    TargetSpec,
    TimeSpansSpec,
    UnitTargetSpec,
)
from mmssl.specs.tasks import (
    ClassifySpec,
    FutureSpec,
    InfoNCESpec,
    LabelSpec,
    LaterFrameSpec,
    LaterLatentSpec,
    MaskedSpec,
    MaskSpec,
    MatchSpec,
    MilNCESpec,
    PairObjective,
    PairSpec,
    PairsSpec,
    SigmoidSpec,
    TaskSpec,
    TripletSpec,
)
from mmssl.specs.towers import (
    BackboneSpec,
    BorrowedSpec,
    CausalConvSpec,
    ConvPositionSpec,
    CutSpec,
    EmbeddingSpec,
    FixedPositionSpec,
    FrameLatentsSpec,
    FramesSpec,
    FrontendSpec,
    IdsSpec,
    JointSpec,
    KaldiSpec,
    PatchSpec,
    PointwiseSpec,
    PositionSpec,
    RecurrentSpec,
    SpectrumSpec,
    StemSpec,
    SummedSpec,
    TowerSpec,
    Trainable,
    TransformerSpec,
    UtteranceSpec,
    WaveConvSpec,
    WaveSpec,
    WholeSpec,
)
from mmssl.specs.views import AugmentSpec, CodesSpec, MixSpec, SegmentsSpec, ViewSpec
