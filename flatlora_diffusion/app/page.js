// What the page does by itself, without asking the server.
(() => {
    const find = (id) => document.getElementById(id);
    const NUMBERS = new Set(["seed", "steps", "guidance", "scale", "width", "height"]);
    const tabs = () =>
        window.gradio_config.components.filter(({ type }) => type === "tabitem").map(({ props }) => props.id);
    const tabButton = (name) => find(`tab-${name}-button`);

    // The stage: two pictures over each other.

    function pictureOf(stage, side) {
        const index = JSON.parse(stage.dataset.methods).indexOf(stage.dataset[side]);
        return find(`${stage.dataset.picture}${index}`)?.querySelector("img");
    }

    function fillStage() {
        const stage = document.querySelector(".stage");
        if (!stage) return;
        let filled = true;
        for (const side of ["left", "right"]) {
            const source = pictureOf(stage, side);
            const shown = stage.querySelector(`img.${side}`);
            const address = source?.getAttribute("src") ?? "";
            filled &&= Boolean(address);
            if ((shown.getAttribute("src") ?? "") !== address) {
                if (address) shown.src = address;
                else shown.removeAttribute("src");
            }
            shown.alt = `${side === "left" ? "Left" : "Right"}: ${stage.dataset[side]}`;
            shown.toggleAttribute("data-old", Boolean(source?.closest(".picture[data-old]")));
            const label = stage.querySelector(`.stage-label.${side}`);
            if (label.textContent !== stage.dataset[side]) label.textContent = stage.dataset[side];
        }
        stage.classList.toggle("empty", !filled);
    }

    function shape(event) {
        const picture = event.target;
        if (picture.matches?.(".stage img") && picture.naturalWidth) {
            picture.closest(".stage").style.setProperty("--shape", picture.naturalWidth / picture.naturalHeight);
        }
    }

    function divide(event) {
        if (event.target.matches?.(".stage input[type=range]")) {
            event.target.closest(".stage").style.setProperty("--at", `${event.target.value}%`);
        }
    }

    function fullScreen(event) {
        const button = event.target.closest?.(".stage-full");
        if (!button) return;
        const frame = button.closest(".stage-frame");
        if (document.fullscreenElement) document.exitFullscreen();
        else if (frame.requestFullscreen) frame.requestFullscreen();
        else frame.classList.toggle("filled"); // a phone that has full screens for videos alone
    }

    // Pictures that aren't those of the settings, or not yet. Attributes, since gradio sets classes as it likes.

    const pictures = () => [...document.querySelectorAll("#pictures .picture")];

    function compareBegins() {
        find("compare-tab").toggleAttribute("data-drawing", true);
        find("slider").scrollIntoView({ block: "nearest" }); // on a phone it may be above
        for (const picture of pictures()) {
            picture.dataset.was = picture.querySelector("img")?.getAttribute("src") ?? "";
            picture.toggleAttribute("data-old", Boolean(picture.dataset.was));
        }
    }

    function compareEnds() {
        find("compare-tab").removeAttribute("data-drawing");
        for (const picture of pictures()) picture.removeAttribute("data-old");
        fillStage();
    }

    function freshen() {
        for (const picture of pictures()) {
            const address = picture.querySelector("img")?.getAttribute("src") ?? "";
            if (address !== picture.dataset.was) picture.removeAttribute("data-old");
        }
    }

    function matches(...given) {
        const names = [
            "prompt", "negative_prompt", "seed", "steps", "guidance", "scale", "sampler", "width", "height",
        ];
        const parts = given.length - 1 - names.length; // the scales of adapters in mixes
        for (let number = 1; number <= parts; number++) names.push(`part${number}`);
        const link = given[names.length];
        const stage = document.querySelector(".stage");
        if (!stage) return;
        const shown = new URLSearchParams((link ?? "").split("?")[1] ?? "");
        const same = names.every((name, index) => {
            const value = given[index] ?? "";
            if (NUMBERS.has(name) || name.startsWith("part")) return Number(value) === Number(shown.get(name)) && value !== "";
            return String(value).trim() === (shown.get(name) ?? "");
        });
        const stale = Boolean(link) && !same;
        find("compare-tab")?.toggleAttribute("data-stale", stale);
        const note = stale ? "Other settings than these pictures have: press Compare" : "";
        const told = stage.querySelector(".stage-note");
        if (told.textContent !== note) told.textContent = note;
        const prompt = link ? `“${shown.get("prompt")}”, seed\u00a0${shown.get("seed")}` : "";
        const caption = stage.querySelector(".stage-prompt");
        if (caption.textContent !== prompt) caption.textContent = prompt;
    }

    function sides(left, right) {
        const stage = document.querySelector(".stage");
        if (!stage) return;
        Object.assign(stage.dataset, { left, right });
        fillStage();
    }

    // Links: the query is the comparison, the part after # the tab.

    function showLink(link) {
        const query = (link ?? "").includes("?") ? `?${link.split("?")[1]}` : "";
        history.replaceState(history.state, "", location.pathname + query + location.hash);
        return query ? location.origin + location.pathname + query : "";
    }

    function openTab() {
        const wanted = location.hash.slice(1);
        const name = tabs().includes(wanted) ? wanted : "compare";
        const button = tabButton(name);
        if (button && button.getAttribute("aria-selected") !== "true") button.click();
    }

    function tabClicked(event) {
        const name = tabs().find((tab) => event.target.closest?.(`#tab-${tab}-button`));
        const mark = name === "compare" ? "" : `#${name}`; // a button is called so: the browser would scroll there
        if (!name || !event.isTrusted || location.hash === mark) return;
        history.pushState(null, "", location.pathname + location.search + mark);
    }

    // A link in the page's words: by itself it would drop the query, and load the page again.
    function linkClicked(event) {
        const name = event.target.closest?.("a[href^='#']")?.getAttribute("href").slice(1);
        if (!tabs().includes(name)) return;
        event.preventDefault();
        history.pushState(null, "", `${location.pathname}${location.search}#${name}`);
        openTab();
    }

    // Keys: Enter compares, Shift+Enter makes a line.

    const ENTER = {
        prompt: "compare",
        "blind-prompt": "blind-draw",
        "shake-prompt": "shake-draw",
        "strength-prompt": "strength-draw",
    };

    function keyPressed(event) {
        if (event.key !== "Enter" || event.isComposing) return;
        const field = Object.keys(ENTER).find((id) => event.target.closest?.(`#${id} textarea`));
        if (!field) return;
        event.stopPropagation(); // gradio has it the other way round, on keypress
        if (event.shiftKey || event.type !== "keydown") return;
        event.preventDefault();
        find(ENTER[field]).click();
    }

    // A server that has gone, or was started anew: whatever is pressed then would do nothing.

    const root = () => (window.gradio_config?.root ?? location.origin).replace(/\/$/, "");
    let known = null;
    let missed = 0;

    async function ask() {
        if (document.hidden) return;
        let told = "";
        try {
            const answer = await fetch(`${root()}/gradio_api/app_id`, { cache: "no-store" });
            const { app_id: id } = await answer.json();
            known ??= id;
            missed = 0;
            if (id !== known) told = "The app was started anew. <a href>Reload the page</a> to go on.";
        } catch {
            missed += 1;
            if (missed > 1) told = "The app does not answer: it was ended, or the network is gone.";
        }
        const banner = find("server-gone") ?? document.createElement("div");
        if (!banner.id) {
            banner.id = "server-gone";
            banner.setAttribute("role", "alert");
            document.body.append(banner);
        }
        if (banner.innerHTML !== told) banner.innerHTML = told;
    }

    // At the start. Nothing is bound to single elements: gradio makes them when and as often as it likes.

    let waiting = false;
    new MutationObserver(() => {
        if (waiting) return;
        waiting = true;
        requestAnimationFrame(() => {
            waiting = false;
            freshen();
            fillStage();
        });
    }).observe(document.documentElement, {
        subtree: true, childList: true, attributes: true, attributeFilter: ["src"],
    });
    document.addEventListener("load", shape, true);
    document.addEventListener("input", divide, true);
    document.addEventListener("click", fullScreen, true);
    document.addEventListener("click", tabClicked, true);
    document.addEventListener("click", linkClicked, true);
    document.addEventListener("keydown", keyPressed, true);
    document.addEventListener("keypress", keyPressed, true);
    addEventListener("popstate", openTab);
    addEventListener("hashchange", openTab);
    setInterval(ask, 4000);
    window.flatlora = { ask, compareBegins, compareEnds, matches, sides, showLink, openTab };
})();
