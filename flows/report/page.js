"use strict";
/* The page works without this script: it then shows every slice, without slider and viewer. */
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  root.classList.add("js");

  /* Light and dark: the system's choice, until the reader makes one. */
  const themeButton = document.getElementById("theme");
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (systemDark.matches ? "dark" : "light")) === "dark";
  const nameTheme = () => {
    themeButton.textContent = isDark() ? "Light" : "Dark";
    themeButton.setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours");
    themeButton.setAttribute("aria-pressed", String(isDark()));
  };
  themeButton.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  systemDark.addEventListener("change", nameTheme);
  nameTheme();

  /* A picture of a case as it is shown now: the one in the chosen display window. */
  const pictures = (box) => all(".tile", box).map((tile) => {
    const images = all("img", tile);
    return images.find((image) => image.dataset.window === box.dataset.shownWindow) || images[0];
  });

  /* Before and after. The range input is the handle, so keys and screen readers work. */
  const setUpCompare = (box) => {
    const [left, right] = [".left", ".right"].map((side) => box.querySelector(side));
    const [before, after] = [".before", ".after"].map((side) => box.querySelector(side));
    const stage = box.querySelector(".stage");
    const range = box.querySelector("input[type=range]");
    const choices = pictures(box).filter((image) => !image.dataset.role.startsWith("error"));
    for (const select of [left, right]) {
      for (const image of choices) select.add(new Option(image.dataset.name, image.dataset.role));
    }
    left.value = choices.some((image) => image.dataset.role === "view") ? "view" : choices[0].dataset.role;
    right.value = choices[choices.length - 1].dataset.role;
    const draw = () => {
      const now = new Map(pictures(box).map((image) => [image.dataset.role, image]));
      for (const [image, select] of [[before, left], [after, right]]) {
        image.src = now.get(select.value).src;
        image.alt = now.get(select.value).alt;
      }
      stage.style.setProperty("--at", `${range.value}%`);
      range.setAttribute("aria-valuetext", `${Math.round(range.value)}% ${left.selectedOptions[0].text}, the rest ${right.selectedOptions[0].text}`);
    };
    for (const control of [left, right, range]) control.addEventListener("input", draw);
    box.addEventListener("redraw", draw);
    draw();
  };

  const show = (section, index) => {
    for (const box of all(".case", section)) {
      const chosen = box.dataset.case === index;
      box.classList.toggle("shown", chosen);
      if (chosen && !box.dataset.ready) {
        box.dataset.ready = "yes";
        setUpCompare(box);
      }
    }
  };
  for (const section of all("section.task")) {
    if (!section.querySelector(".case")) continue;
    show(section, "0");
    for (const input of all(".pick input", section)) input.addEventListener("change", () => show(section, input.value));
    for (const input of all(".window input", section)) {
      input.addEventListener("change", () => {
        for (const box of all(".case", section)) {
          box.dataset.shownWindow = input.value;
          box.dispatchEvent(new Event("redraw"));
        }
      });
    }
  }

  /* The viewer: all pictures of a case under one transform (zoom, and the centre on [0, 1]). */
  const viewer = document.getElementById("viewer");
  const panes = viewer.querySelector(".panes");
  const soloButton = viewer.querySelector("[data-do=solo]");
  const view = { zoom: 1, x: 0.5, y: 0.5 };
  const MAX_ZOOM = 40;
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const shownPanes = () => all(".pane", panes).filter((pane) => pane.offsetParent !== null);
  const fit = (pane, image) => Math.min(pane.clientWidth / image.naturalWidth, pane.clientHeight / image.naturalHeight);

  const place = () => {
    for (const pane of shownPanes()) {
      const image = pane.querySelector("img");
      if (!image.naturalWidth) continue;
      const scale = fit(pane, image) * view.zoom;
      const [left, top] = [pane.clientWidth / 2 - view.x * image.naturalWidth * scale, pane.clientHeight / 2 - view.y * image.naturalHeight * scale];
      image.style.transform = `translate(${left}px, ${top}px) scale(${scale})`;
      pane.classList.toggle("crisp", scale >= 2);
    }
    document.getElementById("viewer-zoom").textContent = `${view.zoom.toFixed(view.zoom < 10 ? 1 : 0)}×`;
  };
  const moveTo = (zoom, x, y) => {
    view.zoom = clamp(zoom, 1, MAX_ZOOM);
    const margin = 0.5 / view.zoom;
    view.x = clamp(x, margin, 1 - margin);
    view.y = clamp(y, margin, 1 - margin);
    place();
  };
  /* Zoom about a point of a pane: what lies under the pointer stays there. */
  const zoomAt = (pane, factor, clientX, clientY) => {
    const image = pane.querySelector("img");
    const box = pane.getBoundingClientRect();
    const zoom = clamp(view.zoom * factor, 1, MAX_ZOOM);
    const keep = (offset, length) => offset / (length * fit(pane, image)) * (1 / view.zoom - 1 / zoom);
    moveTo(zoom,
      view.x + keep(clientX - box.left - box.width / 2, image.naturalWidth),
      view.y + keep(clientY - box.top - box.height / 2, image.naturalHeight));
  };
  const pan = (pane, dx, dy) => {
    const image = pane.querySelector("img");
    const scale = fit(pane, image) * view.zoom;
    moveTo(view.zoom, view.x - dx / (image.naturalWidth * scale), view.y - dy / (image.naturalHeight * scale));
  };
  const solo = (on, pane) => {
    if (pane) for (const other of all(".pane", panes)) other.classList.toggle("chosen", other === pane);
    panes.classList.toggle("solo", on);
    soloButton.setAttribute("aria-pressed", String(on));
    soloButton.textContent = on ? "All pictures" : "One picture";
    place();
  };

  const addPane = (image, chosen) => {
    const pane = document.createElement("div");
    const copy = new Image();
    const label = document.createElement("span");
    const name = document.createElement("b");
    const figures = document.createElement("i");
    copy.src = image.src;
    copy.alt = image.alt;
    copy.draggable = false;
    copy.addEventListener("load", place);
    name.textContent = image.dataset.name;
    figures.textContent = image.dataset.figures;
    label.append(name, image.dataset.figures ? figures : "");
    pane.className = chosen ? "pane chosen" : "pane";
    pane.append(copy, label);
    pane.addEventListener("wheel", (event) => {
      event.preventDefault();
      zoomAt(pane, Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0018)), event.clientX, event.clientY);
    }, { passive: false });
    pane.addEventListener("dblclick", () => solo(!panes.classList.contains("solo"), pane));
    const touches = new Map();
    pane.addEventListener("pointerdown", (event) => {
      pane.setPointerCapture(event.pointerId);
      touches.set(event.pointerId, event);
      pane.classList.add("dragging");
    });
    pane.addEventListener("pointermove", (event) => {
      const last = touches.get(event.pointerId);
      if (!last) return;
      touches.set(event.pointerId, event);
      const other = [...touches.values()].find((touch) => touch.pointerId !== event.pointerId);
      if (other) {
        const reach = (touch) => Math.hypot(touch.clientX - other.clientX, touch.clientY - other.clientY);
        zoomAt(pane, reach(event) / Math.max(reach(last), 1), (event.clientX + other.clientX) / 2, (event.clientY + other.clientY) / 2);
      } else {
        pan(pane, event.clientX - last.clientX, event.clientY - last.clientY);
      }
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      pane.addEventListener(kind, (event) => {
        touches.delete(event.pointerId);
        if (!touches.size) pane.classList.remove("dragging");
      });
    }
    panes.append(pane);
  };

  const open = (box, chosen) => {
    panes.replaceChildren();
    for (const image of pictures(box)) addPane(image, image === chosen);
    document.getElementById("viewer-title").textContent = box.querySelector(".case-name").textContent;
    viewer.showModal();
    solo(false);
    moveTo(1, 0.5, 0.5);
  };
  for (const button of all(".tile .open")) {
    button.addEventListener("click", () => {
      const box = button.closest(".case");
      open(box, pictures(box).find((image) => button.contains(image)));
    });
  }

  const chosenPane = () => shownPanes().find((pane) => pane.classList.contains("chosen")) || shownPanes()[0];
  const centreZoom = (factor) => moveTo(view.zoom * factor, view.x, view.y);
  const actions = {
    in: () => centreZoom(1.5),
    out: () => centreZoom(1 / 1.5),
    reset: () => moveTo(1, 0.5, 0.5),
    solo: () => solo(!panes.classList.contains("solo")),
    close: () => viewer.close(),
  };
  for (const button of all("[data-do]", viewer)) button.addEventListener("click", () => actions[button.dataset.do]());
  viewer.addEventListener("keydown", (event) => {
    const step = 60;
    const keys = {
      "+": actions.in, "=": actions.in, "-": actions.out, "0": actions.reset,
      ArrowLeft: () => pan(chosenPane(), step, 0), ArrowRight: () => pan(chosenPane(), -step, 0),
      ArrowUp: () => pan(chosenPane(), 0, step), ArrowDown: () => pan(chosenPane(), 0, -step),
    };
    const numbered = all(".pane", panes)[Number(event.key) - 1];
    const act = keys[event.key] || (numbered && (() => solo(true, numbered)));
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  });
  viewer.addEventListener("close", () => panes.replaceChildren());
  addEventListener("resize", () => viewer.open && place());
})();
