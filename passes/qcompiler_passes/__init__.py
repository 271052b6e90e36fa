"""The built-in passes, targets and pipelines, as a plug-in like any other."""

from qcompiler.plugin import Plugin
from qcompiler_passes.account import Account
from qcompiler_passes.align_scales import AlignScales
from qcompiler_passes.annotate import Annotate
from qcompiler_passes.calibrate import Calibrate
from qcompiler_passes.choose_ranges import ChooseRanges
from qcompiler_passes.cleanup import Cleanup
from qcompiler_passes.convert_float16 import ConvertFloat16
from qcompiler_passes.correct_bias import CorrectBias
from qcompiler_passes.equalize import Equalize
from qcompiler_passes.expand_activations import ExpandActivations
from qcompiler_passes.expand_operators import ExpandOperators
from qcompiler_passes.fold_batchnorm import FoldBatchnorm
from qcompiler_passes.fold_bias import FoldBias
from qcompiler_passes.fold_constants import FoldConstants
from qcompiler_passes.fold_pad import FoldPad
from qcompiler_passes.fold_scales import FoldScales
from qcompiler_passes.fold_width import FoldWidth
from qcompiler_passes.form_blocks import FormBlocks
from qcompiler_passes.guard_float import GuardFloat
from qcompiler_passes.import_quantization import ImportQuantization
from qcompiler_passes.insert_qdq import InsertQdq
from qcompiler_passes.lower_integer import LowerInteger
from qcompiler_passes.migrate_scales import MigrateScales
from qcompiler_passes.normalize import Normalize
from qcompiler_passes.normalize_gemm import NormalizeGemm
from qcompiler_passes.normalize_pooling import NormalizePooling
from qcompiler_passes.pad_channels import PadChannels
from qcompiler_passes.place import Place
from qcompiler_passes.power_of_two_factors import PowerOfTwoFactors
from qcompiler_passes.quantize_blocks import QuantizeBlocks
from qcompiler_passes.quantize_dynamic import QuantizeDynamic
from qcompiler_passes.recompose import Recompose
from qcompiler_passes.round_weights import RoundWeights
from qcompiler_passes.scale_weights import ScaleWeights
from qcompiler_passes.select_kernels import SelectKernels
from qcompiler_passes.split_groups import SplitGroups
from qcompiler_passes.targets import TARGETS

_FLOAT = (
    "normalize,fold-constants,import-quantization,recompose,normalize-pooling,fold-pad,fold-bias,fold-batchnorm,fold-bias,"
    "normalize-gemm,fold-constants"
)
_BALANCE = "equalize,migrate-scales"
_PLACE = "account,expand-operators,expand-activations,split-groups,pad-channels,fold-width,form-blocks,annotate,place"
_INTEGER = "insert-qdq,lower-integer,fold-scales,select-kernels,guard-float,cleanup"

LEVELS = {
    "O0": f"{_FLOAT},{_PLACE},calibrate{{collector=minmax means=0}},power-of-two-factors,align-scales,"
    f"scale-weights{{search=false}},{_INTEGER}",
    "O1": f"{_FLOAT},{_PLACE},calibrate{{means=0}},power-of-two-factors,align-scales,scale-weights,{_INTEGER}",
    "O2": f"{_FLOAT},{_BALANCE},{_PLACE},calibrate,power-of-two-factors,align-scales,scale-weights,"
    f"round-weights{{samples=8 rows=8 largest=25 compensate=false}},correct-bias,{_INTEGER}",
    "O3": f"{_FLOAT},{_BALANCE},{_PLACE},calibrate{{means=128}},choose-ranges,"
    f"power-of-two-factors,align-scales,scale-weights,round-weights,correct-bias{{samples=128}},{_INTEGER}",
}
"""What `-O0` to `-O3` run: the same rewrites, with more and more time for accuracy."""

DEFAULT_PIPELINE = LEVELS["O2"]

_UNCALIBRATED = (
    "normalize,fold-constants,recompose,normalize-pooling,fold-pad,fold-bias,fold-batchnorm,fold-bias,fold-constants,"
)

MODES = {
    "dynamic": f"{_UNCALIBRATED}form-blocks,quantize-dynamic,cleanup",
    "weight-only": f"{_UNCALIBRATED}form-blocks,quantize-blocks,cleanup",
    "float16": f"{_UNCALIBRATED}form-blocks,convert-float16,cleanup",
}
"""What `--mode` runs instead: pipelines that need no calibration data."""

PLUGIN = Plugin(
    "qcompiler-passes",
    passes=(
        Account,
        AlignScales,
        Annotate,
        Calibrate,
        ChooseRanges,
        Cleanup,
        ConvertFloat16,
        CorrectBias,
        Equalize,
        ExpandActivations,
        ExpandOperators,
        FoldBatchnorm,
        FoldBias,
        FoldConstants,
        FoldPad,
        FoldScales,
        FoldWidth,
        FormBlocks,
        GuardFloat,
        ImportQuantization,
        InsertQdq,
        LowerInteger,
        MigrateScales,
        Normalize,
        NormalizeGemm,
        NormalizePooling,
        PadChannels,
        Place,
        PowerOfTwoFactors,
        QuantizeBlocks,
        QuantizeDynamic,
        Recompose,
        RoundWeights,
        ScaleWeights,
        SelectKernels,
        SplitGroups,
    ),
    targets=TARGETS,
    pipelines={"default": DEFAULT_PIPELINE, **LEVELS, **MODES},
)
