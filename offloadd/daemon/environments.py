"""Environments as somebody asks for them by hand; builds make their own."""

from __future__ import annotations

from typing import Any

from offloadd.daemon.workshop import Workshop
from offloadd.environment.recipe import EnvironmentRecipe, environment_recipe
from offloadd.environment.store import Environment
from offloadd.host import native_systems
from offloadd.model.environment import EnvironmentRequest
from offloadd.model.system import SYSTEMS, System
from offloadd.process import Progress


async def make_environment(
    shop: Workshop, request: EnvironmentRequest, progress: Progress, *, rebuild: bool = False
) -> Environment:
    """The environment that is asked for, made when it is missing.

    Raises:
        NotFoundError, UsageError: no environment, or several, have that digest.
        HostError, ImageError: it cannot be made.
    """
    return await shop.environments.ensure(find_recipe(shop, request), progress, rebuild=rebuild)


async def unpack_environment(shop: Workshop, request: EnvironmentRequest, progress: Progress) -> dict[str, Any]:
    """The same, unpacked on this host, for a shell in it."""
    async with shop.environments.open(find_recipe(shop, request), progress) as environment:
        root = await shop.environments.roots.ensure(environment, progress)
    return {**environment_view(environment), "root": str(root)}


def find_recipe(shop: Workshop, request: EnvironmentRequest) -> EnvironmentRecipe:
    """The recipe of what is asked for."""
    if request.digest is not None:
        return shop.environments.called(request.digest).recipe
    system = request.system or native_systems()[0]
    return environment_recipe(request.suite, SYSTEMS[system].debian, request.packages)


async def remove_environment(shop: Workshop, beginning: str) -> Environment:
    """Remove the one whose digest begins so.

    Raises:
        NotFoundError, UsageError: none or several do.
        NotAllowedError: a build runs in it.
    """
    environment = shop.environments.called(beginning)
    await shop.environments.remove(environment.digest)
    return environment


def environment_view(environment: Environment) -> dict[str, Any]:
    system = _system_of(environment.recipe)
    return {**environment.to_json(), "system": system.name if system else ""}


def _system_of(recipe: EnvironmentRecipe) -> System | None:
    """The system type with the recipe's Debian architecture."""
    return next((system for system in SYSTEMS.values() if system.debian == recipe.architecture), None)
