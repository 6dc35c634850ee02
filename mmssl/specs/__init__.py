"""Every record a YAML file may contain: typed, frozen, unknown keys refused.

A run = towers + views + tasks + optimisation + data. `config.py` fills presets in and reports
misspelt keys; `build/` turns these records into modules.
"""

from mmssl.specs.base import Modality, Number, Schedule, Spec
from mmssl.specs.frontends import (
    BorrowedSpec,
    CutSpec,
    EmbeddingSpec,
    FrameLatentsSpec,
    FramesSpec,
    FrontendSpec,
    IdsSpec,
    KaldiSpec,
    PatchSpec,
    SpectrumSpec,
    StemSpec,
    SummedSpec,
    UtteranceSpec,
    WaveConvSpec,
    WaveSpec,
    WholeSpec,
)
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
    MLPSpec,
    ScoreSpec,
    SpaceSpec,
)
from mmssl.specs.networks import (
    AlexNetSpec,
    Audio2VecSpec,
    BYOLASpec,
    ConvAV8Spec,
    ConvSpec,
    DilatedConvSpec,
    EfficientNetSpec,
    PASESpec,
    ResNet18Spec,
    ResNet50Spec,
    ResNetSpec,
    S3DGSpec,
    SincNetSpec,
    SpeechConvSpec,
    VGG16Spec,
    WaveResNetSpec,
)
from mmssl.specs.objectives import (
    CosineSpec,
    CriticSpec,
    CrossCorrelationSpec,
    InfoNCESpec,
    MilNCESpec,
    PairObjective,
    QueueSpec,
    SemiHardSpec,
    SigmoidSpec,
    TripletSpec,
)
from mmssl.specs.players import AlignmentSpec
from mmssl.specs.quantizers import GumbelSpec, NearestSpec, QuantizerSpec
from mmssl.specs.reconstruct import (
    ConvDecoderSpec,
    ReconstructSpec,
    SequenceDecoderSpec,
    SlicesSpec,
    SpeakerSpec,
    WaveNetSpec,
)
from mmssl.specs.regress import ProsodySpec, RegressSpec, WaveDecoderSpec
from mmssl.specs.run import (
    DataSpec,
    OptimSpec,
    RunSpec,
    TrainSpec,
    TrunkSpec,
    ValidateSpec,
)
from mmssl.specs.separate import PermutationSpec, RemixSpec, SeparateSpec
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
    ClusterSpec,
    FutureSpec,
    GapSpec,
    LabelSpec,
    LaterFrameSpec,
    LaterLatentSpec,
    MaskedSpec,
    MaskSpec,
    MatchSpec,
    OrderSpec,
    PairSpec,
    PairsSpec,
    PrototypesSpec,
    RotationSpec,
    SequenceSpec,
    SiameseSpec,
    TaskSpec,
)
from mmssl.specs.towers import (
    BackboneSpec,
    CausalConvSpec,
    ConvPositionSpec,
    FixedPositionSpec,
    JointSpec,
    PointwiseSpec,
    PositionSpec,
    RecurrentSpec,
    SpectrumAugmentSpec,
    TowerSpec,
    Trainable,
    TransformerSpec,
)
from mmssl.specs.views import AugmentSpec, CodesSpec, MixSpec, SegmentsSpec, ViewSpec
