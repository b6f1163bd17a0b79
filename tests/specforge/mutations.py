"""Small faults that can be put into Python source, in expressions, arguments and statements."""

import ast
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

OPERATORS: dict[type[ast.operator], list[type[ast.operator]]] = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div, ast.Add],
    ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.FloorDiv],
    ast.Pow: [ast.Mult],
}
COMPARISONS: dict[type[ast.cmpop], list[type[ast.cmpop]]] = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}
OTHER = {ast.And: ast.Or(), ast.Or: ast.And()}
REFUSING = ("check_", "_check_")
SKIPPED = (ast.Raise, ast.Assert, ast.JoinedStr, ast.arguments, ast.FunctionDef, ast.ClassDef)


class Mutation(NamedTuple):
    """Bytes `begin:end` of a file become `text`."""

    file: str
    line: int
    kind: str
    begin: int
    end: int
    text: str

    def apply(self, source: bytes) -> bytes:
        """The changed source."""
        return source[: self.begin] + self.text.encode() + source[self.end :]


def find_mutations(file: str, source: bytes, lines: set[int]) -> list[Mutation]:
    """Every mutation of statements in functions that begin on one of `lines`; each compiles."""
    # Where each line begins, in bytes: the tree has lines and columns.
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    found = []
    for statement in statements(ast.parse(source)):
        if statement.lineno not in lines or refuses(statement):
            continue

        changed = list(of_statement(statement))
        for part in parts(statement):
            changed += changes(part)
        for node, kind, new in changed:
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            mutation = Mutation(file, node.lineno, kind, begin, end, written(new))
            result = mutation.apply(source)
            if result != source and compiles(result):
                found.append(mutation)
    return found


def statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements in function bodies, of inner functions too; docstrings and checks left out."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.name.startswith(REFUSING):
            continue

        # Statements of a function within this one come with that one.
        inside = list(ast.walk(ast.Module(function.body, [])))
        of_inner = set()
        for node in inside:
            if isinstance(node, ast.FunctionDef):
                of_inner.update(ast.walk(node))
        for node in inside:
            if not isinstance(node, ast.stmt) or isinstance(node, SKIPPED) or node in of_inner:
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            yield node


def refuses(statement: ast.stmt) -> bool:
    """Whether a statement is there for bad input alone."""
    if isinstance(statement, ast.If | ast.For):
        return all(isinstance(node, ast.Raise) for node in statement.body)
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return ast.unparse(statement.value.func).startswith(REFUSING)
    return False


def parts(statement: ast.stmt) -> Iterator[ast.expr]:
    """The statement's own expressions with all inside, not those of statements within it."""
    waiting = _expressions(statement)
    if isinstance(statement, ast.AnnAssign):
        waiting.remove(statement.annotation)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.expr):
            yield node
        is_device = isinstance(node, ast.keyword) and node.arg == "device"
        if not isinstance(node, SKIPPED) and not is_device:
            waiting += _expressions(node)


def _expressions(node: ast.AST) -> list[ast.AST]:
    return [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]


Change = tuple[Any, str, ast.AST]


def of_statement(statement: ast.stmt) -> Iterator[Change]:
    """A statement left out: one made for its effect, or one that changes a name it reads."""
    if isinstance(statement, ast.Expr):
        yield statement, "statement left out", ast.Pass()
    if isinstance(statement, ast.Assign):
        written_names = set()
        for target in statement.targets:
            written_names |= _names(target)
        if written_names & _names(statement.value):
            yield statement, "statement left out", ast.Pass()


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def changes(node: ast.expr) -> Iterator[Change]:
    """Every change of one expression."""
    match node:
        case ast.BinOp():
            yield from operations(node)
        case ast.UnaryOp():
            yield node, "without its sign or not", node.operand
        case ast.Compare(ops=[op]):
            yield from (
                (node, "another comparison", with_fields(node, ops=[kind()]))
                for kind in COMPARISONS[type(op)]
            )
        case ast.BoolOp():
            yield node, "and for or", with_fields(node, op=OTHER[type(node.op)])
        case ast.IfExp():
            yield node, "branches swapped", with_fields(node, body=node.orelse, orelse=node.body)
        case ast.Constant():
            yield from (
                (node, "another constant", ast.Constant(value))
                for value in other_values(node.value)
            )
        case ast.Attribute(value=ast.Name(id="table")):
            yield (
                node,
                "another leaf",
                with_fields(node, attr={"Q": "K", "K": "V", "GATE": "UP"}.get(node.attr, "Q")),
            )
        case ast.Subscript():
            yield from shifted(node)
        case ast.Call():
            yield from calls(node)


def operations(node: ast.BinOp) -> Iterator[Change]:
    """Another operator, the operands swapped where that matters, or the left one alone."""
    for kind in OPERATORS.get(type(node.op), []):
        yield node, "another operator", with_fields(node, op=kind())
    if not isinstance(node.op, ast.Add | ast.Mult):
        yield node, "operands swapped", with_fields(node, left=node.right, right=node.left)
    yield node, "an operand alone", node.left


def other_values(value: Any) -> list[Any]:
    """Constants near a number or truth value; none for a text."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value * 2 if value else 1.0]
    return []


def shifted(node: ast.Subscript) -> Iterator[Change]:
    """An index or a slice's bound one further."""
    indices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    for index in indices:
        if isinstance(index, ast.Slice):
            bounds = [bound for bound in (index.lower, index.upper) if bound is not None]
        elif isinstance(index, ast.Name | ast.Constant):
            bounds = [index]
        else:
            bounds = []
        for bound in bounds:
            if not isinstance(bound, ast.Constant) or isinstance(bound.value, int):
                yield bound, "off by one", ast.BinOp(bound, ast.Add(), ast.Constant(1))


def calls(node: ast.Call) -> Iterator[Change]:
    """An argument left out, two swapped, or the call left out: what goes in comes out."""
    for keyword in node.keywords:
        if keyword.arg != "device":
            rest = [other for other in node.keywords if other is not keyword]
            yield node, f"without {keyword.arg}", with_fields(node, keywords=rest)

    if len(node.args) > 1:
        yield node, "without the last argument", with_fields(node, args=node.args[:-1])
        for i in range(len(node.args) - 1):
            args = list(node.args)
            args[i : i + 2] = [args[i + 1], args[i]]
            yield node, "arguments swapped", with_fields(node, args=args)

    # A method's call becomes its object, a function's call its first argument.
    modules = ("torch", "F", "math")
    is_method = isinstance(node.func, ast.Attribute) and not ast.unparse(
        node.func.value
    ).startswith(modules)
    if is_method:
        yield node, "call left out", node.func.value  # pyright: ignore
    elif node.args and not isinstance(node.args[0], ast.Starred):
        yield node, "call left out", node.args[0]


def with_fields(node: ast.AST, **fields: Any) -> ast.AST:
    """A shallow copy with other fields."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def written(node: ast.AST) -> str:
    """Source text, in parentheses where a neighbour could bind tighter."""
    text = ast.unparse(node)
    if isinstance(node, ast.BinOp | ast.UnaryOp | ast.BoolOp | ast.Compare | ast.IfExp):
        return f"({text})"
    return text


def compiles(source: bytes) -> bool:
    """Whether it is Python."""
    try:
        compile(source, "mutated", "exec")
    except SyntaxError:
        return False
    return True
