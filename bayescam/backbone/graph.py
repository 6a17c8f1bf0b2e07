"""Cut a network in two places, so that it reads maps -> pool -> head, without hooks.

The network is traced once by torch.fx in eval mode; both parts share the network's parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

_POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d)
_POOL_FUNCTIONS = (nn.functional.adaptive_avg_pool2d, nn.functional.avg_pool2d, torch.mean)
_NEUTRAL = (nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten)


class _Tracer(fx.Tracer):
    """Keeps torch's and torchvision's own blocks whole: their train/eval switch must stay theirs."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_block = m.__module__.startswith(("torch.nn", "torchvision.ops"))
        return is_block and not isinstance(m, nn.Sequential)


class Split:
    """The two halves of a network around its feature maps.

    Args:
        maps: images (N, C, H, W) -> maps (N, D', h, w).
        pool: maps -> features (N, D), the head's input.
        is_average: pool is the plain mean over the cells, so that CAM's completeness holds exactly.
    """

    def __init__(self, maps: fx.GraphModule, pool: fx.GraphModule, is_average: bool) -> None:
        self.maps = maps
        self.pool = pool
        self.is_average = is_average

    def run_maps(self, images: Tensor) -> Tensor:
        return self.maps(images)

    def run_pool(self, maps: Tensor) -> Tensor:
        return self.pool(maps)


def last_linear(net: nn.Module) -> str:
    """The name of the network's last ``nn.Linear``: the layer that bayescam makes Bayesian."""
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError(f"{type(net).__name__} does not end in an nn.Linear: there is no layer to make Bayesian")
    return names[-1]


def split(net: nn.Module, *, head: str, maps: str | None = None) -> Split:
    """Cut ``net`` before its linear ``head`` and after its feature ``maps``.

    Args:
        net: a network that ends in the linear layer ``head``.
        head: dotted name of that layer.
        maps: dotted module name (or fx node name) of the maps; None takes what enters the last average pooling.

    Raises:
        ValueError: the network cannot be traced, has no such node, or its tail does not depend on the maps alone.
    """
    was_training = net.training
    net.eval()
    try:
        graph = _Tracer().trace(net)
    except Exception as error:
        raise ValueError(
            f"{type(net).__name__} cannot be traced by torch.fx ({error}); wrap it in a module whose forward has "
            "no data-dependent control flow"
        ) from error
    finally:
        net.train(was_training)
    modules = dict(net.named_modules())
    head_node = _find(graph, head, "head")
    features = head_node.args[0]
    if not isinstance(features, fx.Node):
        raise ValueError(f"head={head!r} does not take one tensor")
    maps_node = _find(graph, maps, "maps") if maps else _before_pooling(features, modules)
    is_average = _is_average(features, maps_node, modules)
    first = fx.GraphModule(net, _ending_at(graph, maps_node))
    second = fx.GraphModule(net, _between(graph, maps_node, features))
    return Split(first, second, is_average)


def _find(graph: fx.Graph, name: str, argument: str) -> fx.Node:
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
    inside = [node for node in graph.nodes if node.op == "call_module" and str(node.target).startswith(name + ".")]
    named = [node for node in graph.nodes if node.name == name]
    found = calls or named or inside
    if not found:
        known = ", ".join(str(node.target) for node in graph.nodes if node.op == "call_module")[-300:]
        raise ValueError(f"{argument}={name!r} is not in the network; its last modules are: {known}")
    if calls or named:
        return found[-1]
    return _last_of(found)


def _last_of(inside: list[fx.Node]) -> fx.Node:
    """A traced-through block ends where something outside it begins to use it."""
    node = inside[-1]
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op == "call_module" or user.op == "output":
            break
        if user.op == "call_function" and user.target in (*_POOL_FUNCTIONS, torch.flatten):
            break
        if user.op == "call_method" and user.target in ("mean", "flatten", "view", "reshape"):
            break
        node = user
    return node


def _is_pooling(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _POOLS)
    if node.op == "call_function":
        return node.target in _POOL_FUNCTIONS
    return node.op == "call_method" and node.target == "mean"


def _before_pooling(features: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    node = features
    while not _is_pooling(node, modules):
        parents = [parent for parent in node.all_input_nodes if parent.op != "get_attr"]
        if len(parents) != 1 or parents[0].op == "placeholder":
            raise ValueError("no average pooling before the head: name the feature maps by maps=")
        node = parents[0]
    return node.all_input_nodes[0]


def _is_average(features: fx.Node, maps: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the way from maps to features is one global mean and otherwise only reshapes (in eval mode)."""
    node, pools = features, 0
    while node is not maps:
        if _is_pooling(node, modules):
            pools += 1
            if not _is_global(node, modules):
                return False
        elif not _is_neutral(node, modules):
            return False
        if len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
    return pools == 1


def _is_global(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
    if node.target is nn.functional.adaptive_avg_pool2d:
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        return size in (1, (1, 1), [1, 1])
    if node.target is nn.functional.avg_pool2d:
        return False
    cells = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(cells, (list, tuple)) and sorted(c % 4 for c in cells if isinstance(c, int)) == [2, 3]


def _is_neutral(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _NEUTRAL)
    if node.op == "call_function":
        return node.target in (torch.flatten, nn.functional.dropout)
    return node.op == "call_method" and node.target in ("flatten", "view", "reshape", "squeeze")


def _copy(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = copied.graph_copy(graph, mapping)
    copied.output(output)
    return copied, mapping


def _ending_at(graph: fx.Graph, end: fx.Node) -> fx.Graph:
    copied, mapping = _copy(graph)
    _set_output(copied, mapping[end])
    return copied


def _between(graph: fx.Graph, start: fx.Node, end: fx.Node) -> fx.Graph:
    copied, mapping = _copy(graph)
    begin = mapping[start]
    with copied.inserting_before(next(iter(copied.nodes))):
        entry = copied.placeholder("feature_maps")
    finish = entry if start is end else mapping[end]
    begin.replace_all_uses_with(entry)
    _set_output(copied, finish)
    for node in reversed(list(copied.nodes)):
        if node.op == "placeholder" and node is not entry:
            if node.users:
                raise ValueError("the head does not depend on the maps alone (a skip connection goes around them)")
            copied.erase_node(node)
    copied.lint()
    return copied


def _set_output(graph: fx.Graph, node: fx.Node) -> None:
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (node,)
    needed = _ancestors(node)
    for other in reversed(list(graph.nodes)):
        if other not in needed and other.op not in ("output", "placeholder"):
            graph.erase_node(other)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, waiting = set(), [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting.extend(current.all_input_nodes)
    return found
