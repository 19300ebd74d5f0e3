"""Shows the result of `upcycle inspect`: the experts of every layer, and the routing."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from upcycle import targets
from upcycle.cli.screen import grid, out
from upcycle.cli.views.routers import condition, rows_apart
from upcycle.system.wording import count, place_of


def show_anatomy(anatomy: dict[str, Any]) -> None:
    """Show one row for each layer."""
    out.print(f"{anatomy['checkpoint']}: {anatomy['model_type']}, {anatomy['num_layers']} layers")
    trained = any("cosine_between_at_start" in row for row in anatomy["layers"])
    columns = ["layer", "experts", "width", "dtype", "cosine between", "cosine to dense", "router norm"]
    columns += ["router cosine", "condition", *(["began at"] if trained else [])]
    table = grid("", *columns)
    for row in anatomy["layers"]:
        if not row["num_experts"]:
            table.add_row(_place(row), "dense", str(row["width"]), row["dtype"], "", "", "", "", "")
            continue
        dense = row["cosine_to_dense"]
        groups = [row, *([row["universal"]] if "universal" in row else [])]
        table.add_row(
            _place(row),
            " + ".join(str(group["num_experts"]) for group in groups),
            " + ".join(str(group["width"]) for group in groups),
            row["dtype"],
            " and ".join(_range(group["cosine_between"]) for group in groups if group["cosine_between"]),
            f"{sum(dense) / len(dense):.4f}" if dense else "",
            f"{sum(row['router_norms']) / len(row['router_norms']):.4f}",
            rows_apart(row["router"]["cosine"], short=True),
            condition(row["router"]["condition"]),
            *_began(row.get("cosine_between_at_start")),
        )
    out.print(table)
    if "routing" in anatomy:
        show_routing(anatomy["routing"])
    if anatomy["provenance"]:
        made = anatomy["provenance"]
        how = _how(made["recipe"]) if made["recipe"] else ""
        out.print(f"made from {made['source']['name']}{how}")
        for training in made.get("training", ()):
            out.print(f"trained for {training['step']} steps, {count(training['tokens'])} tokens")
        if made["blueprint_hash"]:
            out.print(f"blueprint {made['blueprint_hash']}")
    for note in anatomy["notes"]:
        out.print(f"[dim]{escape(note)}[/]", markup=True)


def show_routing(routing: dict[str, Any]) -> None:
    """Show the routing: one row for each layer, then the favourite tokens of each expert."""
    names = [domain["name"] for domain in routing["domains"]]
    table = grid(
        f"\non {', '.join(names)}", "layer", "busiest", "idlest", "confidence", "left behind", "divergence"
    )
    for row in routing["layers"]:
        load, apart = row["load"], [x for i, line in enumerate(row["divergence"]) for x in line[:i]]
        table.add_row(
            _place(row),
            f"{max(load):.1%}",
            f"{min(load):.1%}",
            f"{row['confidence']:.3f}",
            f"{row['left_behind']:.1%}",
            f"{sum(apart) / len(apart):.4f} bits" if apart else "",
        )
    out.print(table)
    if routing["kind"] == "text":
        for row in routing["layers"]:
            for expert, favourites in enumerate(row["favourites"]):
                liked = " ".join(str(token) for token, _ in favourites)
                out.print(f"layer {_place(row)}, expert {expert}: {liked}")


def _range(found: dict[str, float]) -> str:
    return f"{found['mean']:.4f} ({found['min']:.4f}..{found['max']:.4f})"


def _began(found: dict[str, float] | None) -> list[str]:
    """Return the mean cosine between experts when training began, in a cell of its own."""
    return [f"{found['mean']:.4f}"] if found else []


def _how(recipe: dict[str, Any]) -> str:
    return targets.recorded(recipe["moe"]).made_by(recipe)


def _place(row: dict[str, Any]) -> str:
    return place_of(row.get("stack", "layers"), row["layer"])
