"""The course as a web page, built once: whole, of its own, and its model says what PyTorch's says."""
import functools
import http.server
import json
import re
import threading

import pytest
import torch

from lora_edu import evaluate, load_adapter, load_pretrained, set_strength
from lora_edu.course.labs.fable_live import curves, fable_live
from lora_edu.models.pretrained import BISTRO_ADAPTER
from lora_edu.training import bistro
from tools import build_site as site

pytestmark = [pytest.mark.slow, pytest.mark.browser]
PAGES = ["index", "claims", "api", "fable", "devices", *(f"notebooks/{path.stem}" for path in site.notebooks())]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "html"
    assert site.build(out) == 0, "Sphinx has something to say: python dev.py site"
    return out


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(built):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture
def visit(chromium, address):
    """``page = visit("claims")``; afterwards nothing was asked of another host, and the console held no error."""
    pages, wrong = [], []

    def opened(name, width=1200, dark=False, script=True, query="", counted=True):
        context = chromium.new_context(viewport={"width": width, "height": 900}, java_script_enabled=script,
                                       color_scheme="dark" if dark else "light")
        page = context.new_page()
        pages.append(context)
        page.set_default_timeout(30_000)
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(
            (address, "data:", "blob:")) else None)
        page.on("console", lambda said: wrong.append(f"{said.text} {said.location}")
                if said.type == "error" and counted else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"{address}{name}.html{query}")
        return page
    yield opened
    for context in pages:
        context.close()
    assert wrong == []


def test_every_link_of_every_page_leads_to_a_file_and_a_place(built):
    """Sphinx checks its own; these are all, those of the claims' tables and of raw HTML too."""
    pages = {file: file.read_text(encoding="utf-8") for file in built.rglob("*.html")
             if "_static" not in file.parts}
    ids = {file: set(re.findall(r'\bid="([^"]+)"', text)) for file, text in pages.items()}
    for file, text in pages.items():
        for target in re.findall(r'\bhref="([^"]+)"', re.sub(r"<script.*?</script>", "", text, flags=re.S)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            there = (file.parent / path.partition("?")[0]).resolve() if path else file
            there = there / "index.html" if there.is_dir() else there
            assert there.exists(), f"{file.relative_to(built)} links to {target}"
            if anchor and there in ids:
                assert anchor in ids[there], f"{file.relative_to(built)} links to {target}"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_nothing_of_another_host_and_fits_a_phone(name, visit):
    for width, dark in ((1200, False), (390, True)):
        page = visit(name, width, dark)
        fits = page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth + 1")
        assert fits, f"{name} at {width}"


@pytest.mark.parametrize("name", ["index", "claims", "api", "notebooks/00_start_here", "notebooks/05_the_memory_bill"])
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing_serious(name, dark, visit):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = visit(name, dark=dark, counted=False)         # axe itself looks for style sheets in wrong places
    page.wait_for_timeout(500)
    found = axe.Axe().run(page).response["violations"]
    serious = {each["id"]: each["nodes"][0]["html"][:200] for each in found
               if each["impact"] in ("serious", "critical")}
    assert serious == {}


def test_every_lab_of_a_notebook_has_its_place_and_moves(visit):
    """Its sentence is the stored one; a key moves it; and no lab is left without data but those that train."""
    total = 0
    for path in site.notebooks():
        page = visit(f"notebooks/{path.stem}")
        places = page.locator(".lora-place")
        total += places.count()
        for i in range(places.count()):
            place = places.nth(i)
            place.scroll_into_view_if_needed()
            page.wait_for_function("(i) => document.querySelectorAll('.lora-place')[i].dataset.alive", arg=i)
            said = place.locator(".say")
            before = said.inner_text()
            assert not re.search("undefined|NaN", place.inner_text())
            slider = place.locator("input[type=range]:not([disabled])").first
            slider.focus()
            for key in ("End", "Home"):
                page.keyboard.press(key)
                if said.inner_text() != before:
                    break
            assert said.inner_text() != before, (path.stem, i)
    assert total == len(list((site.SITE / "labs").glob("*.json")))


def test_without_javascript_a_picture_and_its_numbers_stand_there(visit):
    page = visit("index", script=False)
    assert page.locator(".lora-place .still img").is_visible()
    assert "nats per token" in page.locator(".lora-place .still").inner_text()
    page = visit("notebooks/04_rank_and_alpha", script=False)
    assert page.locator(".lora-place .still img").first.is_visible()


def test_what_is_set_is_in_the_address_and_back_and_forward_lead_through_it(visit):
    page = visit("notebooks/02_lora_in_a_transformer", query="?target_picker.rank=16")
    page.locator(".lora-place[data-alive]").wait_for()
    said = page.locator(".say").first
    assert said.inner_text().startswith("rank 16 on")
    page.locator("input[type=range]").first.press("ArrowRight")
    page.wait_for_url("**rank=20**")
    one = said.inner_text()
    page.wait_for_timeout(3100)                  # within three seconds it would be one move, and one step back
    page.locator("input[type=range]").first.press("Home")
    page.wait_for_url("**target_picker.rank=1")
    page.go_back()
    page.wait_for_function("(text) => document.querySelector('.say').textContent === text", arg=one)
    page.go_back()
    page.wait_for_function("() => document.querySelector('.say').textContent.startsWith('rank 16 on')")
    page.go_forward()
    page.wait_for_function("(text) => document.querySelector('.say').textContent === text", arg=one)


def test_one_control_on_its_way_is_one_step_back(visit):
    page = visit("notebooks/02_lora_in_a_transformer", query="?target_picker.rank=16")
    page.locator(".lora-place[data-alive]").wait_for()
    steps = page.evaluate("() => history.length")
    for _ in range(4):
        page.locator("input[type=range]").first.press("ArrowRight")
        page.wait_for_timeout(500)
    assert page.evaluate("() => history.length") == steps + 1


@pytest.mark.parametrize("name, query, said", [
    ("index", "fable_live.strength=99", "strength 1.2"), ("index", "fable_live.strength=-5", "strength 0.0"),
    ("index", "fable_live.strength=abc", "strength 0.0"), ("index", "fable_live.strength=null", "strength 0.0"),
    ("index", "fable_live.prompt=", "strength 0.0"), ("index", "fable_live.prompt=123", "strength 0.0"),
    ("notebooks/02_lora_in_a_transformer", "target_picker.rank=1e9", "rank "),
    ("notebooks/05_the_memory_bill", "memory_calculator.model=none&memory_calculator.batch=[]", ""),
    ("notebooks/04_rank_and_alpha", "rank_alpha_map.rule=x&rank_alpha_map.lr=7", "")])
def test_an_address_that_asks_for_what_is_not_there_gets_what_is(name, query, said, visit):
    """And no error in the console, which `visit` looks at."""
    page = visit(name, query=f"?{query}")
    if name == "index":
        page.wait_for_function("() => document.querySelector('.big')?.querySelectorAll('span[title]').length > 3")
    page.locator(".lora-place[data-alive] .say").first.wait_for()
    page.wait_for_function("() => document.querySelector('.lora-place[data-alive] .say').textContent.length > 9")
    assert page.locator(".lora-place[data-alive] .say").first.inner_text().startswith(said)
    assert not re.search("undefined|NaN|99", page.locator(".lora-place[data-alive] .say").first.inner_text())
    if "123" in query:
        assert page.locator(".big").inner_text().startswith("123")


@pytest.mark.parametrize("width", [390, 1280])
def test_what_is_on_a_page_is_found_behind_a_button_where_there_is_no_room(width, visit):
    page = visit("notebooks/00_start_here", width)
    page.locator("button.secondary-toggle").first.click()
    link = page.locator("dialog a[href^='#']").nth(2)
    assert link.is_visible()
    link.click()
    page.wait_for_function("() => scrollY > 100")


def test_the_footer_leads_on_once(visit):
    page = visit("notebooks/01_lora_linear_from_scratch")
    assert page.locator("a.right-next").count() == 1


def test_a_card_that_is_none_is_told_so(visit):
    page = visit("notebooks/05_the_memory_bill")
    page.locator(".lora-place").first.scroll_into_view_if_needed()
    field = page.locator("input[data-name=card]").first
    field.wait_for()
    for text in ("-5", "0", "1000000000"):
        field.fill(text)
        assert "a number up to 10,000, please; counted is with 24" in page.locator(".lora-place").first.inner_text()
    field.fill("48")
    assert "please" not in page.locator(".lora-place").first.inner_text()
    assert "fits your 48 GB" in page.locator(".say").first.inner_text()


def test_nothing_on_a_page_asks_a_kernel(visit):
    page = visit("notebooks/04_rank_and_alpha")
    page.locator(".lora-place").first.scroll_into_view_if_needed()
    page.locator(".lora-place[data-alive]").first.wait_for()
    assert page.get_by_text("open this setting in the trainer").count() == 0
    assert "read, not run" in page.locator("blockquote").first.inner_text()


def test_claims_are_those_of_the_stored_notebooks_and_failures_come_first(built):
    page = (built / "claims.html").read_text(encoding="utf-8")
    stored = 0
    for path in site.notebooks():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            said = "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))
            if "claim(" in "".join(cell["source"]):
                stored += len(re.findall(r"^(?:✓ holds|≠ differs here|\? undecided): ", said, re.M))
    assert f"{stored} sentences" in page and stored > 250
    assert page.index(">Differs here<") < page.index(">Undecided<") < page.index(">Holds<")
    assert page.count("holds if") == 3 and "claims-wide" in page


def test_a_notebook_can_be_downloaded_and_its_solutions_are_folded(built):
    for path in site.notebooks():
        assert (built / "_sources" / "notebooks" / path.name).read_bytes() == path.read_bytes()
        page = (built / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert page.count("<summary>Solution</summary>") >= 4 and "Run this cell to move it" not in page


# -- the model in the page ---------------------------------------------------------------------------------------------

@pytest.fixture
def fable(visit):
    page = visit("index")
    page.wait_for_function("() => document.querySelector('.lora-place[data-alive] > div:last-child')?.live")
    page.evaluate("() => { window.place = document.querySelector('.lora-place[data-alive] > div:last-child'); }")
    page.get_by_role("button", name="stop").click()
    return page


TEXTS = ["Once upon a time there was a king who", "The old wolf said to the three little pigs:",
         "name: Clover | food: Greek",
         bistro.prompt(bistro.cards("test", 4)[3]), "“Alas!” cried she — it’s 12 o’clock;  two  spaces\n\nand a line",
         "x", "She'll don't we've", "Käse, naïve, Ωμέγα, 東京", "1234567890 times 3.14", "   leading and trailing   "]


READ = """([ids, strength]) => { const { model } = window.place.live; model.clear(); model.strengths[0] = strength;
    return ids.map((id) => Array.from(model.step(id))); }"""


def test_its_tokens_are_the_tokenizer_s(fable):
    _, tokenizer = load_pretrained()
    for text in TEXTS + [sentence for _, sentence in bistro.examples("test", 20)]:
        ids = fable.evaluate("(text) => window.place.live.tokenizer.encode(text)", text)
        assert ids == tokenizer.encode(text).ids, text
        assert fable.evaluate("(ids) => window.place.live.tokenizer.decode(ids)", ids) == tokenizer.decode(ids)


def test_its_logits_are_pytorch_s_on_ten_prompts_at_five_strengths(fable):
    """To 1e-3, where logits reach 15; the strength changes between tokens as well."""
    model, tokenizer = load_pretrained()
    load_adapter(model, BISTRO_ADAPTER)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        for strength in (0, 0.3, 0.7, 1, 1.2):
            set_strength(model, strength)
            with torch.no_grad():
                ours = model(torch.tensor([ids]))[0]
            theirs = torch.tensor(fable.evaluate(READ, [ids, strength]))
            torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)


def test_a_strength_that_changes_between_tokens(fable):
    """Oracle: PyTorch token by token with a cache, the dial turned in between."""
    model, tokenizer = load_pretrained()
    load_adapter(model, BISTRO_ADAPTER)
    ids, cache, ours = tokenizer.encode(TEXTS[0]).ids, model.new_cache(), []
    with torch.no_grad():
        for i, token in enumerate(ids):
            set_strength(model, i / 10)
            ours.append(model(torch.tensor([[token]]), cache)[0, 0])
    theirs = fable.evaluate("""(ids) => { const { model } = window.place.live; model.clear();
        return ids.map((id, i) => { model.strengths[0] = i / 10; return Array.from(model.step(id)); }); }""", ids)
    torch.testing.assert_close(torch.tensor(theirs), torch.stack(ours), atol=1e-3, rtol=0)


def test_it_writes_a_card_of_the_reader_s_own_and_the_dial_turns_it(fable):
    page = fable
    field = page.get_by_label("a beginning or a card of your own")
    dial = page.get_by_role("slider", name="strength")
    for _ in range(10):
        dial.press("ArrowRight")
    field.fill("name: Clover | food: Greek | price: cheap")
    page.get_by_role("button", name="write it").click()
    page.wait_for_function(
        "() => /Clover.*Greek/.test(document.querySelector('.big').textContent.split('=>')[1] ?? '')")
    page.wait_for_function("() => document.querySelector('.say').textContent.includes('measured in this page')")
    said = page.locator(".say").inner_text()
    assert said.startswith("strength 1.0") and "tokens a second" in said
    sentence = float(re.search(r"a card's sentence ([\d.]+)", said)[1])
    assert sentence < 1 < curves()["restaurants"][0]
    assert {title for title in page.locator(".big span[title]").evaluate_all("nodes => nodes.map((n) => n.title)")} == {
        "strength 1.0"}


def spoken(page):
    return page.locator(".big span[title]").all_text_contents()


def until_it_ended(page):
    page.wait_for_function("() => document.querySelector('.say').textContent.includes('measured in this page')")
    return spoken(page)


def test_moved_when_it_has_ended_it_writes_again_and_another_is_another(fable):
    page, dial = fable, fable.get_by_role("slider", name="strength")
    page.get_by_role("button", name="a card").click()
    assert page.get_by_role("button", name="a card").get_attribute("aria-pressed") == "true"
    tale = until_it_ended(page)
    dial.press("End")
    page.wait_for_function("() => document.querySelector('.big span[title]')?.title === 'strength 1.2'")
    assert until_it_ended(page) != tale
    dial.press("Home")
    page.wait_for_function("() => document.querySelector('.big span[title]')?.title === 'strength 0.0'")
    assert until_it_ended(page) == tale, "the same beginning, the same draws"
    page.get_by_role("button", name="another").click()
    page.wait_for_function("(n) => document.querySelectorAll('.big span[title]').length < n", arg=len(tale))
    page.wait_for_function("() => document.querySelectorAll('.big span[title]').length > 12")
    assert spoken(page)[:12] != tale[:12]


def test_the_browsers_back_brings_the_text_with_it(fable):
    page, field = fable, fable.get_by_label("a beginning or a card of your own")
    page.get_by_role("button", name="a card").click()
    page.wait_for_url("**prompt=name**")
    page.wait_for_timeout(3100)
    field.fill("The old wolf")
    field.press("Enter")
    page.wait_for_url("**prompt=The+old+wolf**")
    wolf = "".join(until_it_ended(page))
    page.go_back()
    page.wait_for_function("(wolf) => document.querySelector('.big').textContent.startsWith('name:') && [...document"
                           ".querySelectorAll('.big span[title]')].map((each) => each.textContent).join('') !== wolf",
                           arg=wolf)


def test_a_text_that_is_too_long_is_told_so_and_the_next_is_written(fable):
    page, field = fable, fable.get_by_label("a beginning or a card of your own")
    field.fill("the king " * 900)
    field.press("Enter")
    page.wait_for_function("() => document.querySelector('.say').textContent.includes('and fable reads 511: shorten')")
    field.fill("The old wolf")
    field.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.big span[title]').length > 3")
    assert page.locator(".say").inner_text().startswith("strength")


def test_where_the_weights_do_not_come_nothing_breaks(visit):
    page = visit("claims", counted=False)                    # a file that is not there is an error in the console
    page.route("**/*.safetensors", lambda route: route.abort())
    page.goto(page.url.replace("claims", "index"))
    page.get_by_text("fable could not be opened here").first.wait_for()
    for name in ("a card", "another", "stop", "write it"):
        page.get_by_role("button", name=name, exact=True).click()
    page.get_by_role("slider", name="strength").press("End")
    page.wait_for_timeout(700)
    assert "fable could not be opened here" in page.locator(".say").inner_text()


def test_a_kernel_sends_the_same_files_as_bytes(visit):
    """In JupyterLab and Colab binary data comes as a DataView."""
    page = visit("index")
    same = page.evaluate("""async () => {
        const { open } = await import("./_static/labs/fable_live.mjs");
        const data = (await (await fetch("_static/labs/fable.json")).json()).data;
        const bytes = async (path) => new DataView(await (await fetch(`_static/${path}`)).arrayBuffer());
        data.weights = await bytes(data.weights);
        for (const each of data.adapters) each.tensors = await bytes(each.tensors);
        const { model, tokenizer } = await open(data);
        return Array.from(model.step(tokenizer.encode("Once")[0]).slice(0, 5)); }""")
    model, tokenizer = load_pretrained()
    load_adapter(model, BISTRO_ADAPTER)
    with torch.no_grad():
        ours = model(torch.tensor([tokenizer.encode("Once").ids[:1]]))[0, 0, :5]
    torch.testing.assert_close(torch.tensor(same), ours, atol=1e-3, rtol=0)


def test_its_losses_are_pytorch_s(fable):
    model, tokenizer = load_pretrained()
    load_adapter(model, BISTRO_ADAPTER)
    for each in fable_live(address="fable").data["measured"]:
        before, rest = (tokenizer.encode(each[part]).ids for part in ("prompt", "text"))
        ids = torch.tensor([before + rest])
        targets = ids[:, 1:].clone()
        targets[:, :len(before) - 1] = -100
        for strength in (0, 0.5, 1):
            set_strength(model, strength)
            loss = fable.evaluate("""async ([ids, before, strength]) => {
                const { lossOf } = await import("./_static/labs/fable_live.mjs"), { model } = window.place.live;
                model.strengths[0] = strength;
                return lossOf(model, ids, before); }""", [ids[0].tolist(), len(before), strength])
            assert loss == pytest.approx(evaluate(model, [(ids[:, :-1], targets)]), abs=1e-4)
