"""The status page in a real browser, where there is one: it draws what the server is doing, and asks nobody else."""

from __future__ import annotations

import asyncio
import threading

import openai
import pytest
from browser import chromium, needs_chromium
from served import MODEL, serving, sim

pytestmark = needs_chromium


@pytest.fixture
def page():
    with chromium() as browser:
        yield browser.new_page(viewport={"width": 1280, "height": 900})


def load(url: str) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            asked = {"model": MODEL, "prompt": list(range(200)), "max_tokens": 250}
            await asyncio.gather(*(client.completions.create(**asked) for _ in range(24)))

    asyncio.run(main())


def number(page, name: str) -> float:
    return float(page.inner_text(f"#{name}").split()[0].replace(",", "").replace("–", "nan"))


def test_the_page_shows_what_runs_and_then_that_nothing_does(page, tmp_path):
    errors, asked = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    with serving(*sim(), "--max-seqs", 16, "--kv-blocks", 600) as server:
        page.goto(server.url)
        page.wait_for_function("document.getElementById('state').textContent === 'serving'")
        thread = threading.Thread(target=load, args=(server.url,))
        thread.start()
        page.wait_for_function("document.getElementById('running').textContent === '16'")
        assert number(page, "waiting") == 8
        page.wait_for_function("parseFloat(document.getElementById('rate').textContent.replace(',', '')) > 300")
        assert 20 < number(page, "kv") <= 100 and 5 < number(page, "itl") < 100 and number(page, "ttft") > 0
        page.wait_for_timeout(1500)
        page.screenshot(path=tmp_path / "status.png", full_page=True)
        for chart in ("requests", "kv", "batch", "step", "ttft", "itl"):
            assert page.evaluate(f"document.querySelector('#c-{chart} path').getTotalLength()") > 5, chart
        thread.join()
        page.wait_for_function("document.getElementById('running').textContent === '0'")
        assert number(page, "kv") == 0
        assert server.stop() == 0
        page.wait_for_function("document.getElementById('state').textContent === 'no answer from the server'")
    assert [error for error in errors if "ERR_CONNECTION" not in str(error)] == []
    assert {url.removeprefix(server.url) for url in asked} == {"/", "/status"}
