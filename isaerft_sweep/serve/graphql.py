"""GraphQL: W&B's operations. The schema is ``assets/wandb.graphql``; fields that it lacks are errors."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from graphql import (
    DocumentNode,
    ExecutionResult,
    GraphQLError,
    GraphQLSchema,
    MiddlewareManager,
    OperationDefinitionNode,
    build_schema,
    execute_sync,
    parse,
    validate,
)

from isaerft_sweep.errors import IsaerftError
from isaerft_sweep.paths import asset
from isaerft_sweep.serve import artifact_changes, query_cost
from isaerft_sweep.serve.answers import INTERNAL_ERROR
from isaerft_sweep.serve.caller import Caller, global_id, parse_id
from isaerft_sweep.serve.checks import RequestError, disk_refused, json_object
from isaerft_sweep.serve.filters import snake
from isaerft_sweep.serve.graphql_types import (
    AgentView,
    ArtifactFileView,
    ArtifactView,
    CollectionView,
    FileView,
    ProjectView,
    RunView,
    SweepView,
    UserView,
    entity_view,
    manifest_view,
)
from isaerft_sweep.serve.runs import RunKey

log = logging.getLogger("isaerft.serve")
MAX_TOKENS = 2000
MAX_QUERY = 50_000
"""Characters. wandb's longest query has a tenth of that; large values belong into variables."""
MAX_ITEMS = 200_000
"""Number of values in the variables, at all levels."""
MAX_FILES = 1000


@lru_cache(maxsize=1)
def schema() -> GraphQLSchema:
    """The schema; cached."""
    return build_schema(asset("wandb.graphql").read_text(encoding="utf-8"))


@lru_cache(maxsize=256)
def checked(query: str) -> DocumentNode | tuple[GraphQLError, ...]:
    """The parsed query, or its errors. Cached: clients repeat the same few queries."""
    try:
        document = parse(query, max_tokens=MAX_TOKENS)
    except GraphQLError as error:
        return (error,)
    except RecursionError:
        return (GraphQLError("The query is nested too deeply."),)
    return tuple(validate(schema(), document, max_errors=5)) or document


def execute(caller: Caller, query: str, variables: Mapping[str, Any], operation: str | None) -> dict[str, Any]:
    """The response to one GraphQL request, errors included. Raises RequestError for errors that need an HTTP status.

    Args:
        caller: who sent the request.
        query: the GraphQL document.
        variables: the values of its variables.
        operation: the operation of the document to execute; None when it has only one.
    """
    if len(query) > MAX_QUERY:
        raise RequestError(
            f"a query may have at most {MAX_QUERY} characters but got {len(query)}: put values into variables."
        )
    document = checked(query)
    if isinstance(document, tuple):
        log.warning("GraphQL: %s: %s", _operation_name(query), "; ".join(error.message for error in document)[:500])
        return {"data": None, "errors": [error.formatted for error in document]}
    items = itertools.count()
    values = without_nulls(variables, items)
    with query_cost.limited(next(items)):
        result = execute_sync(
            schema(),
            document,
            root_value=Root(caller),
            variable_values=values,
            operation_name=operation,
            field_resolver=resolve,
            type_resolver=lambda value, _info, _type: value.typename,
            middleware=MiddlewareManager(counted),
        )
    return _response(result, document)


def without_nulls(value: Any, items: Iterator[int]) -> Any:
    """Drop nulls: newer clients send null for fields that they do not use, which this schema may lack.

    ``items`` counts the values. Raises RequestError when there are too many.
    """
    if next(items) > MAX_ITEMS:
        raise RequestError(f"variables may have at most {MAX_ITEMS} values: send them in several requests.")
    if isinstance(value, Mapping):
        return {key: without_nulls(part, items) for key, part in value.items() if part is not None}
    return [without_nulls(part, items) for part in value] if isinstance(value, list) else value


def _response(result: ExecutionResult, document: DocumentNode) -> dict[str, Any]:
    if not result.errors:
        return {"data": result.data}
    for error in result.errors:
        cause = error.original_error
        if cause is not None and disk_refused(cause):
            raise cause
        if isinstance(cause, RequestError) and cause.status == 404 and _is_heartbeat(document):
            raise cause  # with status 404 the agent concludes that its sweep no longer exists
        if cause is not None and not isinstance(cause, (IsaerftError, GraphQLError)):
            log.error("GraphQL: an operation failed", exc_info=cause)
            error.message = INTERNAL_ERROR
        else:
            log.warning("GraphQL: %s", error.message[:500])
    return {"data": result.data, "errors": [error.formatted for error in result.errors]}


def _is_heartbeat(document: DocumentNode) -> bool:
    return any(
        isinstance(d, OperationDefinitionNode) and d.name and d.name.value == "Heartbeat" for d in document.definitions
    )


def _operation_name(query: str) -> str:
    match = re.search(r"(query|mutation|subscription)\s+(\w{1,80})", query)
    return match[2] if match else "a query without a name"


def counted(resolver: Callable[..., Any], source: Any, info: Any, **args: Any) -> Any:
    """Middleware that counts the cost of each field, including introspection."""
    query_cost.spend(query_cost.FIELD)
    return resolver(source, info, **args)


def resolve(source: Any, info: Any, **args: Any) -> Any:
    """The value of a field: in a mapping by its name, in a view by its name in snake case."""
    if isinstance(source, Mapping):
        return source.get(info.field_name)
    value = getattr(source, snake(info.field_name), None)
    if callable(value):
        return value(**{snake(name): argument for name, argument in args.items()})
    return value


@dataclass(frozen=True)
class Root:
    """Queries and mutations."""

    caller: Caller

    # -- queries

    @property
    def viewer(self) -> UserView:
        return UserView(self.caller.user, self.caller.server.entity)

    @property
    def server_info(self) -> Any:
        versions = {"max_cli_version": "99.0.0", "min_cli_version": "0.18.7"}
        return {"cliVersionInfo": versions, "features": [], "serverSettings": {"serverMessages": []}}

    def entity(self, name: str | None = None) -> Any:
        return entity_view(name or self.caller.server.entity)

    def project(self, name: str | None = None, entity_name: str | None = None) -> ProjectView | None:
        try:
            return ProjectView(self.caller, self.caller.server.project(entity_name, name))
        except RequestError:
            return None

    model = project

    def models(
        self,
        entity_name: str | None = None,
        after: str | None = None,
        first: int | None = None,
        filters: str | None = None,
        order: str | None = None,
    ) -> Any:
        keys = [key for key in self.caller.server.projects if key[0] == (entity_name or self.caller.server.entity)]
        nodes = [{"node": ProjectView(self.caller, key), "cursor": str(i + 1)} for i, key in enumerate(keys)]
        return {"edges": nodes[int(after or 0) :][:first], "pageInfo": {"endCursor": None, "hasNextPage": False}}

    # -- sweeps and agents

    def upsert_sweep(self, input: dict[str, Any]) -> Any:
        server = self.caller.server
        metadata = {k: input[k] for k in ("description", "displayName") if input.get(k)}
        warnings = []
        if input.get("priorRunsFilters") not in (None, "", "{}", "null"):
            warnings.append("Prior runs are not taken into account by this server.")
        if input.get("controller") not in (None, "", "{}", "null"):
            raise RequestError("this server has its own sampler: leave --controller out.")
        if input.get("id"):
            name, project, entity = parse_id("Sweep", input["id"])
            sweep = server.find_sweep(entity, project, name)
            server.update_sweep(sweep, input.get("config"), input.get("state"), metadata)
        elif not input.get("config"):
            raise RequestError("a new sweep must have a config.")
        else:
            sweep = server.create_sweep(input.get("entityName"), input.get("projectName"), input["config"], metadata)
        warnings += sweep.definition.notes if sweep.definition else ()
        return {"sweep": SweepView(self.caller, sweep), "configValidationWarnings": warnings}

    def import_sweep(self, input: dict[str, Any]) -> Any:
        sweep = self.caller.server.import_sweep(input["entityName"], input["projectName"], input["name"], input["config"])
        return {"sweep": SweepView(self.caller, sweep), "configValidationWarnings": []}

    def create_agent(self, input: dict[str, Any]) -> Any:
        server = self.caller.server
        sweep = server.find_sweep(input.get("entityName"), input.get("projectName"), input["sweep"])
        return {"agent": AgentView(self.caller, server.registry.create_agent(sweep, input["host"], self.caller.user))}

    def agent_heartbeat(self, input: dict[str, Any]) -> Any:
        run_states = json_object("runState", input.get("runState"))
        commands = self.caller.server.registry.heartbeat(input["id"], run_states)
        agent = self.caller.server.agents[input["id"]]
        return {"agent": AgentView(self.caller, agent), "commands": json.dumps(commands)}

    # -- runs

    def upsert_bucket(self, input: dict[str, Any]) -> Any:
        fields = {name: value for name, value in input.items() if value is not None}
        for name in ("config", "summaryMetrics"):
            if name in fields:
                json_object(name, fields[name])
        fields.pop("debug", None), fields.pop("clientMutationId", None)
        project, entity, state = fields.pop("modelName", None), fields.pop("entityName", None), fields.pop("state", None)
        name, storage_id = fields.pop("name", None), fields.pop("id", None)
        if name is None:
            if storage_id is None:
                raise RequestError("a run must be named by its name or its id.")
            name, project, entity = parse_id("Run", storage_id)
        server = self.caller.server
        key = RunKey(entity or server.entity, project or "uncategorized", name)
        run, inserted = server.upsert_run(key, fields, from_run=storage_id is None or input.get("name") is not None)
        if state == "pending":
            log.info("run %s: its client sent the state pending; its state is %s", name, run.state)
        return {"bucket": RunView(self.caller, run), "inserted": inserted, "serverSettings": {"serverMessages": []}}

    def upsert_model(self, input: dict[str, Any]) -> Any:
        server = self.caller.server
        before = len(server.projects)
        view = ProjectView(self.caller, server.ensure_project(input.get("entityName"), input["name"]))
        return {"project": view, "model": view, "inserted": len(server.projects) > before}

    def stop_run(self, input: dict[str, Any]) -> Any:
        name, project, entity = parse_id("Run", input["id"])
        self.caller.server.stop_run(self.caller.server.find_run(entity, project, name))
        return {"success": True}

    def create_run_files(self, input: dict[str, Any]) -> Any:
        server = self.caller.server
        run = server.find_run(input["entityName"], input["projectName"], input["runName"])
        if len(input["files"]) > MAX_FILES:
            raise RequestError(f"at most {MAX_FILES} files can be requested at once but got {len(input['files'])}.")
        folder = server.files_of(run)
        files = [FileView(self.caller, run, name, folder / name.lstrip("/")) for name in input["files"]]
        key = run.key
        return {"runID": global_id("Run", key.name, key.project, key.entity), "uploadHeaders": [], "files": files}

    def mark_run_files_uploaded(self, input: dict[str, Any]) -> Any:
        return {"success": True}

    # -- artifacts

    def artifact(self, id: str) -> ArtifactView | None:
        artifact = self.caller.server.artifacts.get(id)
        return ArtifactView(self.caller, artifact) if artifact else None

    def artifact_collection(self, id: str) -> CollectionView | None:
        key = parse_id("ArtifactCollection", id)
        exists = len(key) == 3 and (key[0], key[1], key[2]) in self.caller.server.artifacts.collections
        return CollectionView(self.caller, (key[0], key[1], key[2])) if exists else None

    def create_artifact(self, input: dict[str, Any]) -> Any:
        return {"artifact": ArtifactView(self.caller, artifact_changes.create(self.caller, input))}

    def create_artifact_manifest(self, input: dict[str, Any]) -> Any:
        artifact = artifact_changes.new_manifest(self.caller, input["artifactID"], input["digest"])
        return {"artifactManifest": manifest_view(self.caller, artifact)}

    def update_artifact_manifest(self, input: dict[str, Any]) -> Any:
        artifact = artifact_changes.new_manifest(self.caller, input["artifactManifestID"], input.get("digest"))
        return {"artifactManifest": manifest_view(self.caller, artifact)}

    def create_artifact_files(self, input: dict[str, Any]) -> Any:
        """URLs for the upload of an artifact's files."""
        specs = input["artifactFiles"]
        for artifact_id in {spec["artifactID"] for spec in specs}:
            artifact_changes.find(self.caller, artifact_id)
        files = [ArtifactFileView(self.caller, spec["artifactID"], spec["name"], {"digest": spec["md5"]}) for spec in specs]
        return {"files": {"edges": [{"node": file} for file in files]}}

    def commit_artifact(self, input: dict[str, Any]) -> Any:
        return {"artifact": ArtifactView(self.caller, artifact_changes.commit(self.caller, input))}

    def update_artifact(self, input: dict[str, Any]) -> Any:
        return {"artifact": ArtifactView(self.caller, artifact_changes.update(self.caller, input))}

    def add_aliases(self, input: dict[str, Any]) -> Any:
        return artifact_changes.change_aliases(self.caller, input, add=True)

    def delete_aliases(self, input: dict[str, Any]) -> Any:
        return artifact_changes.change_aliases(self.caller, input, add=False)

    def use_artifact(self, input: dict[str, Any]) -> Any:
        return {"artifact": ArtifactView(self.caller, artifact_changes.use(self.caller, input))}
