"""The page of `atomtune web`, used in a real browser; its server is the command in its own process."""

import contextlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from atomtune import load
from atomtune.engines.server_process import free_port
from atomtune.settings.command_settings import WebSettings
from atomtune.settings.declare import LARGEST_SEED
from tests.conftest import DIALOGUES
from tests.trained import train_by_heart

pytestmark = pytest.mark.slow
gradio = pytest.importorskip("gradio", reason="needs the extra web")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
#: Without these flags a browser sends requests of its own to its maker's servers.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Web:
    """A running `atomtune web`."""

    def __init__(self, *words: str) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "atomtune", "web", *words, "--port", str(self.port), "--dtype", "float32"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            env={**os.environ, "COLUMNS": "200"},
        )
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("ready: "):
                return
        raise AssertionError("".join(self.lines))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Web":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0


@pytest.fixture(scope="module")
def web(by_heart) -> Iterator[Web]:
    with Web("--adapter_path", str(by_heart), "--max_new_tokens", "40") as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield browser
        browser.close()


@contextlib.contextmanager
def new_page(browser: "playwright.Browser") -> Iterator["playwright.Page"]:
    page = browser.new_page(locale="en-US")
    yield page
    page.close()


class Tab:
    """A page in the browser, with its foreign requests and its errors."""

    def __init__(self, page: "playwright.Page", address: str) -> None:
        self.page, self.address = page, address
        self.foreign: list[str] = []
        self.errors: list[str] = []
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        page.wait_for_selector("#typed textarea")

    def _note(self, request: "playwright.Request") -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.foreign.append(request.url)

    def ask(self, question: str) -> None:
        self.page.fill("#typed textarea", question)
        self.page.press("#typed textarea", "Enter")

    def shows(self, side: str, text: str) -> None:
        playwright.expect(self.page.locator(f"#{side}")).to_contain_text(text, timeout=20_000)

    def edit(self, text: str | None = None) -> None:
        """Edit the last question, or send it again.

        It tries again if a late answer redraws the messages in between, as a person would.
        """
        self.page.wait_for_selector("#typed [data-testid='submit-button']", timeout=20_000)
        for tries_left in range(4, -1, -1):
            try:
                self.page.click("#tuned [aria-label='Edit'], #tuned button[title='Edit']", timeout=4_000)
                if text is not None:
                    self.page.fill("#tuned textarea", text, timeout=4_000)
                self.page.click("#tuned [aria-label='Submit'], #tuned button[title='Submit']", timeout=4_000)
                return
            except playwright.TimeoutError:
                if not tries_left:
                    raise

    def settings(self) -> None:
        self.page.click(".sidebar .toggle-button")
        self.page.wait_for_selector("#compare input", state="visible")


@pytest.fixture
def opened(browser, web) -> Iterator[Callable[..., Tab]]:
    contexts = []

    def opened(**options: object) -> Tab:
        contexts.append(
            browser.new_context(**{"locale": "en-US", "viewport": {"width": 1280, "height": 800}, **options})
        )
        return Tab(contexts[-1].new_page(), web.address)

    yield opened
    for context in contexts:
        context.close()


@needs_browser
def test_the_page_answers_as_chat_and_contacts_no_other_host(opened, by_heart):
    tuned = load(by_heart, dtype="float32")
    tab = opened(locale="zh-CN")
    assert "微调后" in tab.page.inner_text("#tuned")
    assert "输入消息" in tab.page.get_attribute("#typed textarea", "placeholder")
    about = tab.page.inner_text(".about")  # although the terminal uses English
    assert "适配器，基座" in about and "在 cpu 上用 float32" in about
    for question in ("晚安", "今天天气怎么样？"):
        tab.ask(question)
        tab.shows("tuned", tuned.chat(question).replace("\n", ""))
        tab.page.click("#new")
        playwright.expect(tab.page.locator("#tuned .message")).to_have_count(0)
    assert tab.foreign == [] and tab.errors == []


@needs_browser
def test_the_base_answers_beside_the_tuned_model_when_comparing(opened):
    tab = opened()
    assert not tab.page.is_visible("#base")
    tab.settings()
    tab.page.check("#compare input")
    tab.ask("晚安")
    tab.shows("tuned", "晚安，愿你好梦。")
    tab.shows("base", "晚安")
    playwright.expect(tab.page.locator("#base .message.bot")).to_have_count(1, timeout=20_000)
    assert "愿你好梦" not in tab.page.inner_text("#base")


@needs_browser
def test_an_answer_can_be_retried_and_a_question_edited(opened):
    tab = opened()
    tab.ask("晚安")
    tab.shows("tuned", "晚安，愿你好梦。")
    tab.page.click("#tuned [aria-label='Retry'], #tuned button[title='Retry']")
    playwright.expect(tab.page.locator("#tuned .message.bot")).to_have_count(1, timeout=20_000)
    tab.shows("tuned", "晚安，愿你好梦。")
    tab.edit("Who are you?")
    tab.shows("tuned", "I keep the light.")
    assert "晚安" not in tab.page.inner_text("#tuned")
    tab.page.click("#new")
    playwright.expect(tab.page.locator("#tuned .message")).to_have_count(0)


@needs_browser
def test_a_stopped_answer_stays_and_the_next_question_is_answered(browser, models, tmp_path):
    """An adapter of one step has not learned the stop token, so its answers go on until they are stopped."""
    base = Path(shutil.copytree(models("llama"), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20_000}))
    endless = train_by_heart(base, tmp_path, DIALOGUES, steps=1)
    with Web("--adapter_path", str(endless), "--max_new_tokens", "10000") as web, new_page(browser) as page:
        stop_and_begin_anew(Tab(page, web.address))


#: A click and then a question in one script call, so that no answer of the server comes in between.
NEW_AND_ASK = """() => {
    document.querySelector("#new").click();
    const box = document.querySelector("#typed textarea");
    box.value = "Who are you?";
    box.dispatchEvent(new Event("input", {bubbles: true}));
    box.dispatchEvent(new KeyboardEvent("keypress", {key: "Enter", bubbles: true}));
}"""


def stop_and_begin_anew(tab: Tab) -> None:
    page = tab.page
    for count in (1, 2):
        tab.ask("晚安")
        page.locator("#typed [data-testid='stop-button']").dispatch_event("click")
        page.wait_for_selector("#typed [data-testid='submit-button']", timeout=20_000)
        playwright.expect(page.locator("#tuned .message.bot")).to_have_count(count)
    # Begin a new conversation during an answer and ask at once: nothing of the old one may come back.
    tab.ask("今天天气怎么样？")
    tab.shows("tuned", "今天天气怎么样？")
    page.evaluate(NEW_AND_ASK)
    page.wait_for_timeout(1_000)
    if page.input_value("#typed textarea"):  # the question stays in its box if the answer had not ended yet
        page.press("#typed textarea", "Enter")
    tab.shows("tuned", "Who are you?")
    playwright.expect(page.locator("#tuned .message.bot")).to_have_count(1)
    page.wait_for_timeout(1_000)
    assert "今天" not in page.inner_text("#tuned") and "Who are you?" in page.inner_text("#tuned")
    page.click("#new")  # also ends that answer
    page.wait_for_selector("#typed [data-testid='submit-button']", timeout=20_000)


@needs_browser
def test_text_that_looks_like_a_tag_is_shown(opened):
    tab = opened()
    question = "</s><b>晚安</b> &lt; R&D"
    tab.ask(question)
    tab.shows("tuned", question)
    playwright.expect(tab.page.locator("#tuned .message.bot")).to_have_count(1, timeout=20_000)
    tab.edit()
    tab.page.wait_for_timeout(2_000)
    tab.shows("tuned", question)


@needs_browser
@pytest.mark.parametrize("before", ["", "a ``` b "], ids=["outside_code", "after_backticks"])
def test_a_picture_on_another_host_is_not_loaded(opened, before):
    # It would tell that host what the model was made to write into the address.
    with http.server.HTTPServer(("127.0.0.1", 0), NotesPaths) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        question = f"{before}![picture](http://127.0.0.1:{host.server_port}/seen)"
        tab = opened()
        tab.ask(question)
        playwright.expect(tab.page.locator("#tuned .message.bot")).to_have_count(1, timeout=20_000)
        tab.page.evaluate("address => { new Image().src = address }", f"http://127.0.0.1:{host.server_port}/policy")
        tab.page.wait_for_timeout(1_000)
        host.shutdown()
    assert NotesPaths.paths == []


class NotesPaths(http.server.BaseHTTPRequestHandler):
    paths: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_error(404)


@needs_browser
def test_a_conversation_is_saved_as_a_record_that_training_reads(opened, tmp_path):
    tab = opened()
    tab.ask("晚安")
    tab.shows("tuned", "晚安，愿你好梦。")
    assert [message["content"] for message in saved_by(tab.page)] == ["晚安", "晚安，愿你好梦。"]
    tab.ask("Who are you?")
    playwright.expect(tab.page.locator("#tuned .message.bot")).to_have_count(2, timeout=20_000)
    playwright.expect(tab.page.locator("#typed [data-testid='submit-button']")).to_be_visible()
    tab.page.wait_for_timeout(1_000)  # until the button has the new file
    assert [message["role"] for message in saved_by(tab.page)] == ["user", "assistant"] * 2


@needs_browser
def test_the_files_of_a_conversation_are_removed_when_it_is_left(browser, by_heart, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Web("--adapter_path", str(by_heart), "--max_new_tokens", "40") as web, new_page(browser) as page:
        tab = Tab(page, web.address)
        for count in (1, 2):
            tab.ask("晚安")
            playwright.expect(page.locator("#tuned .message.bot")).to_have_count(count, timeout=20_000)
            page.wait_for_selector("#save")
        page.wait_for_timeout(1_000)
        assert len(list(tmp_path.rglob("conversation.jsonl"))) == 1
        page.click("#new")
        playwright.expect(page.locator("#save")).to_be_hidden()
        assert list(tmp_path.rglob("conversation.jsonl")) == []


def saved_by(page: "playwright.Page") -> list[dict]:
    """The messages of the conversation, as the page's button saves them."""
    with page.expect_download() as download:
        page.click("#save")
    return json.loads(Path(download.value.path()).read_text(encoding="utf-8"))["messages"]


def test_a_seed_that_torch_does_not_take_is_refused_in_its_box(by_heart):
    """The page said only "Error", and the terminal showed a traceback."""
    from atomtune.serve.page import Page

    page = Page(load(by_heart), WebSettings(adapter_path=str(by_heart)))
    assert page.seed.preprocess(LARGEST_SEED) == LARGEST_SEED
    with pytest.raises(gradio.Error, match="greater than maximum"):
        page.seed.preprocess(2**70)
    page.close()


@needs_browser
def test_an_empty_system_text_is_sent_when_a_custom_one_is_enabled(browser, models, tmp_path):
    """Without a system text, the template qwen2.5 writes its own persona; an empty text switches it off."""
    trained = train_by_heart(models("qwen3"), tmp_path, DIALOGUES, "--template", "qwen2.5", steps=1)
    with Web("--adapter_path", str(trained), "--max_new_tokens", "4") as web, new_page(browser) as page:
        tab = Tab(page, web.address)
        tab.settings()
        assert not page.is_visible("#system textarea")
        sent = []
        for own_system in (False, True):
            page.set_checked("#own_system input", own_system)
            with page.expect_response("**/run/predict"):  # on a busy machine the question once overtook it
                page.click("#new")
            playwright.expect(page.locator("#save")).to_be_hidden()
            tab.ask("晚安")
            page.wait_for_selector("#save")
            sent.append([(message["role"], message["content"]) for message in saved_by(page)[:-1]])
    assert sent == [[("user", "晚安")], [("system", ""), ("user", "晚安")]]
