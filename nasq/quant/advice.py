"""What to do about an operation that has no integer form, where there is a known way."""

from __future__ import annotations

from nasq.elastic.base import ElasticModule
from nasq.elastic.graph import Node

__all__ = ["hint"]

_SIMPLIFY = (
    "nasq.elastic.simplify(network) gives an equal network of layers that have one (attention: batch_first=True)"
)
_LOGITS = "let the network return its logits, and the loss (cross_entropy) take the softmax"
_NORM = "use BatchNorm2d, a GroupNorm of one group, or LayerNorm over the last dimension"
_RESIZE = "resize by mode='nearest' and whole factors, or by mode='bilinear' with align_corners=False to whole sizes"
_CALLED = "it is called with a weight, so no layer owns it: call the layer itself, and pad in a layer in front of it"

_HINTS = {
    **dict.fromkeys(("log_softmax", "LogSoftmax"), _LOGITS),
    **dict.fromkeys(
        (
            "Conv1d", "BatchNorm1d", "SyncBatchNorm", "MultiheadAttention", "TransformerEncoder", "TransformerEncoderLayer",
        ),
        _SIMPLIFY,
    ),
    "ConvTranspose2d": f"where its kernel is its stride, {_SIMPLIFY}; else use nearest upsampling and a convolution",
    **dict.fromkeys(("GroupNorm", "InstanceNorm2d", "LayerNorm", "LocalResponseNorm"), _NORM),
    **dict.fromkeys(("layer_norm", "group_norm", "batch_norm"), "call the layer (nn.LayerNorm, ...), not the function"),
    "Conv2d": "it pads with zeros, and equally on both sides (padding='same' with an odd kernel); give padding as numbers",
    "BatchNorm2d": "it keeps no running statistics; give it track_running_stats=True",
    **dict.fromkeys(("Upsample", "interpolate", "UpsamplingBilinear2d"), _RESIZE),
    **dict.fromkeys(("conv2d", "linear"), _CALLED),
    **dict.fromkeys(
        ("view", "reshape", "flatten", "permute", "transpose"),
        "the batch has to stay the first dimension: view(x.size(0), ...) or flatten(1)",
    ),
    "squeeze": "name the dimensions that go, and keep the batch and one more",
    **dict.fromkeys(("AdaptiveAvgPool2d", "adaptive_avg_pool2d"), "its output has to divide the map"),
    **dict.fromkeys(("max", "min"), "take the maximum over rows and columns with amax or a max pool"),
    **dict.fromkeys(("einsum", "baddbmm"), "write it as matrix products of tensors of equal dimensions"),
    **dict.fromkeys(("sqrt", "rsqrt", "var", "std", "var_mean", "normalize"), f"for a normalisation, {_NORM}"),
    "dropout": "it drops in evaluation as well; pass training=self.training",
    "detach": "stop the gradient in the loss",
}  # fmt: skip


def hint(node: Node) -> str:
    """What takes the place of an operation without an integer form; empty where nothing is known."""
    known = _HINTS.get(type(node.module).__name__ if node.module is not None else str(node.attributes.get("call")), "")
    if not known and isinstance(node.module, ElasticModule):
        return (
            "write an elastic module of your own as an nn.Module that holds nasq's elastic layers, or as a subclass of "
            "elastic.Container"
        )
    return known
