"""The graph: the level that each level is solved inside, compared with a brute-force reading of the rule."""

from __future__ import annotations

import itertools

import pytest
from core_cases import drawn, flat, seeds
from hypothesis import given
from hypothesis import strategies as st

import mlopt
from mlopt.problem import Graph
from mlopt.testing import SHAPES, ladder, quadratic

References = dict[str, tuple[str, ...]]


@st.composite
def references(draw: st.DrawFn, most: int = 7) -> References:
    """Draw levels `a`, `b`, ..., outermost first, and their references; half of them densely, half sparsely."""
    names = "abcdefg"[: draw(st.integers(1, most))]
    likely = draw(st.integers(1, 6))
    return {
        name: tuple(other for other in names if other != name and draw(st.integers(0, 6)) < likely) for name in names
    }


def build(refs: References) -> Graph | None:
    """Return the graph, or None if a level has no influence or solutions depend on one another in a circle."""
    try:
        return Graph(refs)
    except mlopt.ProblemError as error:
        if "cannot influence" in str(error) or "in a circle" in str(error):
            return None
        raise


def paths(refs: References, start: str) -> list[tuple[str, ...]]:
    """Return every path along references, without repetition of a level."""
    visited, pending = [], [(start,)]
    while pending:
        path = pending.pop()
        visited.append(path)
        pending.extend((*path, ref) for ref in refs[path[-1]] if ref not in path)
    return visited


def host_by_the_rule(refs: References, name: str) -> str | None:
    """Return the innermost outer level that the loss depends on, directly or through other inner levels' losses; if there
    is none, the outermost."""
    names = list(refs)
    outer = names[: names.index(name)]
    if not outer:
        return None
    inner = set(names[names.index(name) + 1 :])
    depended_on = {path[-1] for path in paths(refs, name) if set(path[1:-1]) <= inner}
    return max(depended_on & set(outer), key=names.index, default=names[0])


def descendants(graph: Graph, name: str) -> set[str]:
    return set(graph[name].guests).union(*(descendants(graph, guest) for guest in graph[name].guests))


@drawn(150)
@given(refs=references())
def test_hosts_follow_the_rule(refs: References) -> None:
    graph = build(refs)
    if graph is None:
        return
    names = list(refs)
    for name in names:
        host = graph[name].host
        assert host == host_by_the_rule(refs, name)
        assert host is None or names.index(host) < names.index(name)
        # The last listed is solved first.
        assert graph[name].guests == tuple(n for n in reversed(names) if graph[n].host == name)
    # So each level but the outermost is a guest exactly once, and the outermost never.
    guests = [guest for name in names for guest in graph[name].guests]
    assert sorted(guests) == sorted(names[1:])
    assert descendants(graph, names[0]) == set(names[1:])


@drawn(150)
@given(refs=references())
def test_interior_and_arguments_are_the_dependencies_of_the_objective(refs: References) -> None:
    graph = build(refs)
    if graph is None:
        return
    for name in refs:
        inside = descendants(graph, name)
        node = graph[name]
        depended_on = {path[-1] for path in paths(refs, name)[1:] if set(path[1:]) <= inside}
        assert set(node.interior) == depended_on
        system = {name, *depended_on}
        assert set(node.arguments) == {ref for member in system for ref in refs[member]} - system
        assert not set(node.arguments) & inside


@drawn(150)
@given(refs=references())
def test_parts_cover_the_interior_and_each_precedes_those_it_refers_to(refs: References) -> None:
    graph = build(refs)
    if graph is None:
        return
    for name in refs:
        parts = graph[name].parts
        owners: dict[str, list[str]] = {member: [] for member in graph[name].interior}
        for part in parts:
            for member in (part, *graph[part].interior):
                owners[member].append(part)
        # A level inside two parts would be pulled back twice.
        assert all(len(by) == 1 for by in owners.values())
        for before, after in itertools.combinations(parts, 2):
            used = {before, *graph[before].interior}
            assert not set(graph[after].arguments) & used, f"{after} uses {before} and comes after it"


@drawn(40)
@given(refs=references(most=4), seed=seeds)
def test_a_drawn_graph_has_the_hypergradient_of_its_closed_form(refs: References, seed: int) -> None:
    """Each level is at the solution of its total gradient; the hosts are those of the brute-force reading of the rule."""
    if build(refs) is None:
        return
    shape = {name: (host_by_the_rule(refs, name), refs[name]) for name in refs}
    case = quadratic(shape, mlopt.Dense(), seed=seed, size=1)
    gradient, exact = flat(mlopt.hypergradient(case.problem).gradient), flat(case.gradient)
    assert (gradient - exact).norm() <= 1e-8 * (1 + exact.norm())


@drawn(150)
@given(refs=references())
def test_a_level_without_influence_is_refused(refs: References) -> None:
    names = list(refs)
    reached = {path[-1] for path in paths(refs, names[0])}
    if reached != set(names):
        lost = next(name for name in names if name not in reached)
        with pytest.raises(mlopt.ProblemError, match=f"level '{lost}' cannot influence '{names[0]}'"):
            Graph(refs)


def test_a_circle_of_solutions_is_refused() -> None:
    for circular in circles():
        with pytest.raises(
            mlopt.ProblemError, match="depend on one another in a circle, and none is solved inside the other"
        ):
            Graph(circular)


def circles() -> list[References]:
    """Return the graphs of up to four levels whose solutions depend on one another in a circle."""
    names = "abcd"
    circular = []
    for chosen in itertools.product([0, 1], repeat=12):
        edges = iter(chosen)
        refs = {n: tuple(o for o in names if o != n and next(edges)) for n in names}
        try:
            Graph(refs)
        except mlopt.ProblemError as error:
            if "circle" in str(error):
                circular.append(refs)
    return circular


@pytest.mark.parametrize("shape", SHAPES)
def test_the_hosts_of_the_closed_forms(shape: str) -> None:
    graph = quadratic(shape, mlopt.Dense()).problem.graph
    assert {name: graph[name].host for name in graph.names} == {name: host for name, (host, _) in SHAPES[shape].items()}
    nested = any(graph[name].parts for name in graph.names[1:])
    assert nested == shape.startswith("nested")


def test_tapweight() -> None:
    """Reweighting refers to finetuning, finetuning to pretraining, pretraining to reweighting."""
    graph = Graph({"reweighting": ("finetuning",), "finetuning": ("pretraining",), "pretraining": ("reweighting",)})
    outer, middle, inner = (graph[name] for name in graph.names)
    assert (outer.host, middle.host, inner.host) == (None, "reweighting", "reweighting")
    assert outer.guests == ("pretraining", "finetuning")
    assert outer.parts == ("finetuning", "pretraining")
    assert outer.interior == ("finetuning", "pretraining")
    assert (middle.arguments, inner.arguments) == (("pretraining",), ("reweighting",))
    assert (middle.guests, middle.interior, middle.parts) == ((), (), ())
    assert (inner.guests, inner.interior, inner.parts) == ((), (), ())


def test_nested() -> None:
    graph = Graph({"x": ("y", "z"), "y": ("x", "z"), "z": ("y",)})
    assert (graph["y"].host, graph["z"].host) == ("x", "y")
    assert (graph["x"].guests, graph["x"].interior, graph["x"].parts) == (("y",), ("y", "z"), ("y",))
    assert (graph["y"].guests, graph["y"].interior, graph["y"].parts) == (("z",), ("z",), ("z",))
    assert (graph["x"].arguments, graph["y"].arguments, graph["z"].arguments) == ((), ("x",), ("y",))


@drawn(10)
@given(rungs=st.integers(1, 12))
def test_the_parts_of_a_ladder_are_all_its_levels_in_order(rungs: int) -> None:
    shape = ladder(rungs)
    parts = Graph({name: refs for name, (_, refs) in shape.items()})["outer"].parts
    assert sorted(parts) == sorted(set(shape) - {"outer"})
    for name, (_, refs) in shape.items():
        for ref in set(refs) - {"outer"}:
            assert name == "outer" or parts.index(name) < parts.index(ref)
