"""Small faults that can be put into Python source: operators, constants, comparisons, arguments, casts, statements."""

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
    """Every mutation of statements that begin on one of `lines`, inside functions; each still compiles."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for statement in statements(ast.parse(source)):
        if statement.lineno not in lines or refuses(statement):
            continue
        for node, kind, new in [
            *of_statement(statement),
            *(x for part in parts(statement) for x in changes(part)),
        ]:
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            mutation = Mutation(file, node.lineno, kind, begin, end, written(new))
            if mutation.apply(source) != source and compiles(mutation.apply(source)):
                found.append(mutation)
    return found


def statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements in function bodies, docstrings apart."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and not function.name.startswith(REFUSING):
            for node in ast.walk(ast.Module(function.body, [])):
                docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                if isinstance(node, ast.stmt) and not isinstance(node, SKIPPED) and not docstring:
                    inner = [
                        f
                        for f in ast.walk(ast.Module(function.body, []))
                        if isinstance(f, ast.FunctionDef)
                    ]
                    if not any(node in ast.walk(f) for f in inner):
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
    waiting: list[ast.AST] = [
        node for node in ast.iter_child_nodes(statement) if not isinstance(node, ast.stmt)
    ]
    if isinstance(statement, ast.AnnAssign):
        waiting.remove(statement.annotation)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.expr):
            yield node
        if not isinstance(node, SKIPPED) and not (
            isinstance(node, ast.keyword) and node.arg == "device"
        ):
            waiting += [
                child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)
            ]


Change = tuple[Any, str, ast.AST]


def of_statement(statement: ast.stmt) -> Iterator[Change]:
    """A statement left out: one made for its effect, or one that changes a name it reads."""
    if isinstance(statement, ast.Expr):
        yield statement, "statement left out", ast.Pass()
    if isinstance(statement, ast.Assign):
        set_names = {
            n.id
            for target in statement.targets
            for n in ast.walk(target)
            if isinstance(n, ast.Name)
        }
        if set_names & {n.id for n in ast.walk(statement.value) if isinstance(n, ast.Name)}:
            yield statement, "statement left out", ast.Pass()


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
    return [value * 2 if value else 1.0] if isinstance(value, float) else []


def shifted(node: ast.Subscript) -> Iterator[Change]:
    """An index or a slice's bound one further."""
    for index in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
        bounds = [index.lower, index.upper] if isinstance(index, ast.Slice) else []
        for bound in bounds or ([index] if isinstance(index, ast.Name | ast.Constant) else []):
            if bound is not None and not (
                isinstance(bound, ast.Constant) and not isinstance(bound.value, int)
            ):
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
            args = [*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2 :]]
            yield node, "arguments swapped", with_fields(node, args=args)
    if isinstance(node.func, ast.Attribute) and not ast.unparse(node.func.value).startswith(
        ("torch", "F", "math")
    ):
        yield node, "call left out", node.func.value
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
    return (
        f"({text})"
        if isinstance(node, ast.BinOp | ast.UnaryOp | ast.BoolOp | ast.Compare | ast.IfExp)
        else text
    )


def compiles(source: bytes) -> bool:
    """Whether it is Python."""
    try:
        compile(source, "mutated", "exec")
    except SyntaxError:
        return False
    return True
