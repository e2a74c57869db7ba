"""``llmq recipe``"""

from __future__ import annotations

from typing import Annotated

import typer

from llmq.cli import options
from llmq.cli.console import out, print_json, table

app = typer.Typer(help="Settings of llmq quantize that have a name.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME|FILE", help="See llmq recipe list.", show_default=False)]


@app.command("list")
def list_recipes(json: options.Json = False) -> None:
    """The recipes that come with llmq.

    llmq recipe list
    """
    from llmq.quant.recipe import about, shipped_recipes

    recipes = {name: about(path) for name, path in shipped_recipes().items()}
    if json:
        print_json("llmq.recipes/1", {"recipes": [{"name": name, "about": text} for name, text in recipes.items()]})
        return
    grid = table("recipe", "")
    grid.columns[1].justify = "left"
    for name, text in recipes.items():
        grid.add_row(name, text)
    out.print(grid)


@app.command("show")
def show(name: Name, json: options.Json = False) -> None:
    """The flags that a recipe sets; of a recipe of llm-compressor, those that it comes to.

    llmq recipe show w4a16-gptq
    """
    from llmq.quant.recipe import read_recipe, to_yaml

    recipe = read_recipe(name)
    if json:
        print_json("llmq.recipe/1", {"name": name, "recipe": recipe.flags})
    else:
        out.print(to_yaml(recipe.flags), end="")
