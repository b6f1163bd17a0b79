"""A chat template's tree and program with the charges of its budget in them."""

from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.visitor import NodeTransformer

CHECKED = "eagle3fn_checked"
GROWN = "eagle3fn_grown"
"""Names of two filters: `Budget.checked` and `Budget.grown` of `data.jinja_budget`."""

_CHAIN = 16  # values that an expression joins before they are charged
_PART = 256  # characters of a branch that are charged by themselves
_GROWING = (nodes.Add, nodes.Concat, nodes.Filter, nodes.Call, nodes.List, nodes.Tuple, nodes.Dict)


class LimitedCode(CodeGenerator):
    """Jinja's, which writes values by the environment's `text`."""

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write("environment.text(")


def limited(tree: nodes.Template) -> nodes.Template:
    """A template's tree with charges in it; the given one is changed."""
    return _Limiter().visit(tree)


class _Limiter(NodeTransformer):
    """Puts the charges into a template's tree."""

    def visit_For(self, node: Any) -> nodes.Node:
        """Charge each turn; of a macro or block, each call."""
        self.generic_visit(node)
        node.body = [_tick(node.body), *node.body]
        return node

    visit_Macro = visit_CallBlock = visit_Block = visit_For

    def visit_If(self, node: nodes.If) -> nodes.Node:
        """Charge a branch that writes much by itself."""
        self.generic_visit(node)
        if _own_data(node.body) > _PART:
            node.body = [_tick(node.body), *node.body]
        if _own_data(node.else_) > _PART:
            node.else_ = [_tick(node.else_), *node.else_]
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        """Charge what a name is given; in a namespace, what it has grown by."""
        self.generic_visit(node)
        if _grows(node.node):
            charged = _charged(node.node)
            if isinstance(node.target, nodes.NSRef):
                place = nodes.Name(node.target.name, "load", lineno=node.lineno)
                before = nodes.Getattr(place, node.target.attr, "load", lineno=node.lineno)
                charged.name = GROWN
                charged.args = [before]
            node.node = charged
        return node

    def visit_With(self, node: nodes.With) -> nodes.Node:
        """Charge what its names are given."""
        self.generic_visit(node)
        node.values = [_charged(each) if _grows(each) else each for each in node.values]
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        """Charge arguments."""
        self.generic_visit(node)
        node.args = [_charged(each) if _grows(each) else each for each in node.args]
        for each in node.kwargs:
            if _grows(each.value):
                each.value = _charged(each.value)
        return node

    def visit_Add(self, node: nodes.Node) -> nodes.Node:
        """Charge the parts of an expression that joins many."""
        self.generic_visit(node)
        if _joined(node) > _CHAIN:
            _charge_parts(node)
        return node

    visit_Concat = visit_List = visit_Tuple = visit_Dict = visit_Add


def _tick(body: list[nodes.Node]) -> nodes.ExprStmt:
    call = f"charge({1 + _own_data(body)})"
    return nodes.ExprStmt(nodes.EnvironmentAttribute(call), lineno=1)


def _own_data(body: list[nodes.Node]) -> int:
    """Characters that a body writes by itself, without those of blocks in it."""
    outputs = [node for node in body if isinstance(node, nodes.Output)]
    texts = [node.data for out in outputs for node in out.find_all(nodes.TemplateData)]
    texts += [node.value for out in outputs for node in out.find_all(nodes.Const)]
    return sum(len(text) for text in texts if isinstance(text, str))


def _grows(node: nodes.Node) -> bool:
    """Whether an expression can be larger than what is charged already."""
    called = node.node if isinstance(node, nodes.Call) else None
    if isinstance(called, nodes.Name) and called.name == "namespace":
        return False  # its arguments are charged
    return isinstance(node, _GROWING) or next(node.find_all(_GROWING), None) is not None


def _charged(node: Any) -> nodes.Filter:
    return nodes.Filter(node, CHECKED, [], [], None, None, lineno=node.lineno)


def _joined(node: nodes.Node) -> int:
    """How many values an expression joins, but those that are charged."""
    if isinstance(node, nodes.Filter) and node.name == CHECKED:
        return 1
    inner = list(node.iter_child_nodes())
    return max(1, sum(map(_joined, inner)))


def _charge_parts(node: nodes.Node) -> None:
    """Charge the parts of an expression, but constants."""
    if isinstance(node, nodes.BinExpr):
        node.left = _part(node.left)
        node.right = _part(node.right)
    elif isinstance(node, nodes.Concat):
        node.nodes = [_part(each) for each in node.nodes]
    elif isinstance(node, (nodes.List, nodes.Tuple)):
        node.items = [_part(each) for each in node.items]
    elif isinstance(node, nodes.Dict):
        for each in node.items:
            each.value = _part(each.value)


def _part(node: nodes.Expr) -> nodes.Expr:
    charged = isinstance(node, nodes.Filter) and node.name == CHECKED
    return node if charged or isinstance(node, nodes.Const) else _charged(node)
