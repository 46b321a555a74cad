"""Whether a module treats the rows of its input one by one, as far as its class tells."""

from torch import nn
from torch.nn.modules import module as _module
from torch.nn.modules.batchnorm import _BatchNorm

# In evaluation. What is not here may be so, too. Of an input without an axis of rows the first axis is
# another one, which some of these mix: convolutions of channels, norms over all of a shape. They refuse an
# axis that has become several times as long, so that nobody is given another result.
_ONE_BY_ONE = frozenset(
    (
        *(nn.Identity, nn.Linear, nn.Embedding, nn.PReLU),
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
        *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh),
        *(nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
        *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    )
)


def has_global_hooks() -> bool:
    """Whether something is called around every module, forwards or backwards: it may do anything."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_forward_hooks_always_called
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def is_row_wise(module: nn.Module) -> bool:
    """Whether a module in evaluation mode is a chain of layers that are known to mix no rows."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(hooks) or "forward" in vars(module):
        return False
    if type(module) is nn.Sequential:
        return all(map(is_row_wise, module))
    if isinstance(module, _BatchNorm):
        is_of_torch = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        return is_of_torch and module.running_mean is not None and module.running_var is not None
    if type(module) is nn.Flatten:
        return module.start_dim > 0
    if type(module) is nn.Softmax or type(module) is nn.LogSoftmax:
        return module.dim is not None and (module.dim == -1 or module.dim > 0)
    return type(module) in _ONE_BY_ONE
