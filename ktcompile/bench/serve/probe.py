"""What a server is: whether it answers, which model it has, and what it understands."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from ktcompile.bench.serve.client import Client, make_session, short
from ktcompile.bench.serve.dialect import Api, Dialect, candidates
from ktcompile.bench.serve.outcome import OK
from ktcompile.bench.serve.workload import Request, Workload

_PROMPT_TOKENS, _ANSWER_TOKENS = 8, 2
# How a server says that it does not know a field.
_REFUSALS = ("400", "422")


@dataclass(frozen=True, slots=True)
class Target:
    """A server to be measured. max_model_len: tokens of a request at most, where the server tells."""

    url: str
    model: str
    dialect: Dialect
    max_model_len: int | None


def base_url(text: str) -> str:
    """Return a server's address without the path of its interface. ValueError: it is none."""
    url = text.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--url {text!r} is no address; write http://127.0.0.1:8000")
    return url


async def find(
    url: str,
    model: str | None,
    api: Api,
    workload: Workload,
    *,
    api_key: str | None,
    extra: Mapping[str, Any],
    timeout: float,
    must_list: bool = True,
) -> Target:
    """Return what a server is, after a few short requests.

    model: its name; None is the first that it has. must_list: whether it must be in the server's list, in which some
    have other models than the one that they were started with. ValueError: nobody answers, the key or the model is
    wrong, or no way to write a request is understood."""
    async with make_session(api_key) as session:
        longest = None
        if must_list or model is None:
            model, longest = _choose(await _models(session, url, timeout), model, url)
        client = Client(session, url, 0.0, timeout)
        first = _short(workload.requests[0])
        problem = ""
        for dialect in candidates(api, first.text is None, extra):
            own = workload.prompt(first) if dialect.ids else workload.text(first)
            outcome = await client.send(0, dialect.path, dialect.body(model, own, _ANSWER_TOKENS))
            # An answer may have no token, if it ends at once; it was understood all the same.
            if outcome.status in (OK, "no tokens"):
                return Target(url, model, dialect, longest)
            problem = problem or f"{outcome.status}: {outcome.detail}"
            if outcome.status not in _REFUSALS:
                raise ValueError(f"{url}{dialect.path} does not answer as it should: {problem}")
    raise ValueError(f"{url} understands no request of this benchmark; to the first it said {problem}")


def _short(request: Request) -> Request:
    return request if request.text is not None else replace(request, input_tokens=_PROMPT_TOKENS, blocks=())


async def _models(session: aiohttp.ClientSession, url: str, timeout: float) -> list[dict[str, Any]]:
    limit = aiohttp.ClientTimeout(total=timeout)
    try:
        async with session.get(f"{url}/v1/models", timeout=limit) as response:
            if response.status in (401, 403):
                raise ValueError(f"{url} wants another key ({response.status}); --api-key or OPENAI_API_KEY gives it")
            if response.status != 200:
                text = short(await response.text(errors="replace"))
                raise ValueError(f"{url}/v1/models is no list of models: {response.status} {text}")
            listed = (await response.json(content_type=None))["data"]
            return [dict(entry) for entry in listed]
    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
        raise ValueError(f"no server answers at {url}: {error or 'it took too long'}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{url}/v1/models is no list of models") from error


def _choose(listed: list[dict[str, Any]], model: str | None, url: str) -> tuple[str, int | None]:
    known = {str(entry.get("id")): entry.get("max_model_len") for entry in listed}
    if model is None:
        if not known:
            raise ValueError(f"{url} lists no model; --model-name names one")
        model = next(iter(known))
    if model not in known:
        raise ValueError(f"{url} has no model {model!r}; it has {', '.join(known)}")
    longest = known.get(model)
    return model, longest if isinstance(longest, int) else None
