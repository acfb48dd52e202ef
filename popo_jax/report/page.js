"use strict";
// Draws figures when they come into view, and browses samples. Text reaches the page through textContent alone.
(() => {
  const whole = JSON.parse(document.getElementById("popo-data").textContent);
  const page = unpooled(whole.page);
  const night = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)");
  const drawn = new Map(); // place -> the series that are hidden
  let axis = "", printing = false;

  function unpooled(x) {
    if (Array.isArray(x)) return x.map(unpooled);
    if (x === null || typeof x !== "object") return x;
    if ("$" in x) return whole.lists[x.$];
    return Object.fromEntries(Object.entries(x).map(([k, v]) => [k, unpooled(v)]));
  }

  function element(tag, name, text) {
    const out = document.createElement(tag);
    if (name) out.className = name;
    if (text !== undefined) out.textContent = text;
    return out;
  }

  // ---- figures

  const figure = place => page.figures[place.dataset.figure];
  const colour = i => {
    const palette = page.palettes[night.matches && !printing ? "dark" : "light"];
    return palette[i % palette.length];
  };

  function trace(t, hidden) {
    const c = colour(t.meta.series), out = { ...t, visible: !hidden.has(t.meta.series) };
    const x = axis && t.meta.other_x[axis];
    if (x) out.x = x;
    if (t.line) out.line = { ...t.line, color: c };
    if (t.marker) out.marker = { ...t.marker, color: c };
    if (t.fillcolor) out.fillcolor = t.meta.band ? c : `${c}b8`;
    if (t.error_y) out.error_y = { ...t.error_y, color: ink("--soft") };
    return out;
  }

  const ink = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function layout(f) {
    const soft = ink("--soft"), font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: soft };
    const lines = { gridcolor: ink("--grid"), linecolor: ink("--line"), zerolinecolor: ink("--line"), ticks: "", automargin: true };
    const red = ink("--worry"), l = f.layout, switched = axis && l.meta.other_x.includes(axis);
    return {
      ...l,
      font,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink("--ink") },
      dragmode: touch.matches ? false : "zoom",
      hoverlabel: { bgcolor: ink("--raised"), bordercolor: ink("--line"), font: { ...font, color: ink("--ink") } },
      xaxis: {
        ...l.xaxis, ...lines, showgrid: false, showline: true, zeroline: false, nticks: 7,
        title: { ...l.xaxis.title, text: switched ? axis : l.xaxis.title.text, font },
      },
      yaxis: { ...l.yaxis, ...lines, nticks: 6, title: { text: "" } },
      shapes: (l.shapes || []).map(s => ({ ...s, line: { ...s.line, color: red } })),
      annotations: (l.annotations || []).filter(a => a.name === "worry").map(a => (
        { ...a, font: { ...font, size: 11, color: red }, bgcolor: ink("--paper"), opacity: 0.85, borderpad: 1 })),
      ...(printing ? { autosize: false, width: 330, height: 195 } : { autosize: true }),
    };
  }

  const config = {
    displaylogo: false, responsive: true, displayModeBar: "hover",
    modeBarButtons: [["toImage", "resetScale2d"]], // named, so that none is offered that would send data elsewhere
  };

  function draw(place) {
    const f = figure(place), first = !drawn.has(place);
    if (first) { drawn.set(place, new Set()); legend(place, f); }
    const done = Plotly.react(place, f.data.map(t => trace(t, drawn.get(place))), layout(f), config);
    if (first && drawn.size === 1) done.then(() => performance.mark("first-figure"));
    return done;
  }

  function legend(place, f) {
    const box = place.parentElement.querySelector(".legend"), lines = f.data.filter(t => !t.meta.band);
    if (lines.length < 2) return;
    for (const t of lines) {
      const key = element("button"), hidden = drawn.get(place), i = t.meta.series;
      key.type = "button";
      key.setAttribute("aria-pressed", "true");
      key.title = "Show or hide";
      key.append(swatch(t), element("bdi", "", plain(t.name)));
      key.addEventListener("click", () => {
        if (!hidden.delete(i)) hidden.add(i);
        key.setAttribute("aria-pressed", String(!hidden.has(i)));
        draw(place);
      });
      box.append(key);
    }
  }

  const plain = name => name.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");

  function swatch(t) {
    const ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg"), line = document.createElementNS(ns, "line");
    const thick = t.type === "bar" || t.stackgroup;
    svg.setAttribute("width", thick ? "10" : "18");
    svg.setAttribute("height", "10");
    svg.setAttribute("aria-hidden", "true");
    for (const [k, v] of Object.entries({ x1: 0, x2: 18, y1: 5, y2: 5, "stroke-width": thick ? 10 : 2.2 })) line.setAttribute(k, v);
    const dash = { dash: "5 3", dot: "2 2", dashdot: "6 2 2 2" }[t.line && t.line.dash];
    if (dash) line.setAttribute("stroke-dasharray", dash);
    line.dataset.series = t.meta.series;
    line.style.stroke = colour(t.meta.series);
    if (t.stackgroup) line.style.strokeOpacity = 0.72;
    svg.append(line);
    return svg;
  }

  function redraw(what = [...drawn.keys()]) {
    for (const line of document.querySelectorAll(".legend line")) line.style.stroke = colour(Number(line.dataset.series));
    return Promise.all(what.map(draw));
  }

  const places = [...document.querySelectorAll(".plot")];
  const watch = new IntersectionObserver(seen => {
    for (const s of seen) if (s.isIntersecting) { watch.unobserve(s.target); draw(s.target); }
  }, { rootMargin: "300px 0px" });
  places.forEach(p => watch.observe(p));
  night.addEventListener("change", () => redraw());

  function print(now) {
    printing = now;
    document.documentElement.classList.toggle("printing", now);
    places.forEach(p => watch.unobserve(p));
    redraw(places);
  }
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));

  function axes() {
    const found = new Set(Object.values(page.figures).flatMap(f => f.layout.meta.other_x));
    if (!found.size) return;
    const select = document.getElementById("axis");
    select.append(new Option("steps", ""));
    for (const name of found) select.append(new Option(name, name));
    select.addEventListener("change", () => { axis = select.value; redraw(); });
    select.parentElement.hidden = false;
  }

  // ---- contents

  function contents() {
    const menu = document.querySelector(".menu"), narrow = matchMedia("(max-width: 62rem)");
    const fit = () => { menu.open = !narrow.matches; };
    fit();
    narrow.addEventListener("change", fit);
    const links = new Map([...menu.querySelectorAll("a")].map(a => [a.getAttribute("href").slice(1), a]));
    for (const a of links.values()) a.addEventListener("click", () => { if (narrow.matches) menu.open = false; });
    const seen = new Set(), parts = [...document.querySelectorAll("main > section")];
    const spy = new IntersectionObserver(entries => {
      for (const e of entries) seen[e.isIntersecting ? "add" : "delete"](e.target);
      const here = parts.find(p => seen.has(p));
      for (const [id, a] of links) here && id === here.id ? a.setAttribute("aria-current", "true") : a.removeAttribute("aria-current");
    }, { rootMargin: "-15% 0px -60% 0px" });
    parts.forEach(p => spy.observe(p));
  }

  // ---- samples

  const PER_PAGE = 5;
  const short = x => x === null || x === undefined ? "–" : String(Math.round(x * 1000) / 1000);
  const title = s => String(s).replaceAll("_", " ");

  function browser(box) {
    const { groups, images = {} } = page.browsers[box.dataset.browser];
    const tests = [], filters = element("form", "filters"), pager = element("div", "pager"), list = element("div", "groups");
    const count = element("span"), back = element("button", "", "Earlier"), on = element("button", "", "Later");
    let at = 0, found = groups;
    count.setAttribute("aria-live", "polite");
    back.type = on.type = "button";
    filters.setAttribute("role", "search");
    filters.setAttribute("aria-label", "Samples");

    function field(label, input, name) {
      const out = element("label", name, label);
      out.append(input);
      filters.append(out);
      return input;
    }
    function choice(label, values, test) {
      const known = [...new Set(groups.flatMap(values).filter(v => v !== null && v !== undefined))].map(String).sort();
      if (known.length < 2) return;
      const select = field(label, element("select"));
      select.name = label;
      select.append(new Option("all", ""), ...known.map(v => new Option(title(v), v)));
      tests.push(g => !select.value || (test || values)(g).map(String).includes(select.value));
    }
    choice("Run", g => [g.run]);
    choice("Task", g => [g.task]);
    for (const s of new Set(groups.flatMap(g => Object.keys(g.slices)))) choice(s, g => [g.slices[s]]);
    choice("Verdict", g => g.answers.map(a => a.reason));
    choice("Signal", g => [g.signal]);

    const [from, to] = ["from", "to"].map(name => Object.assign(element("input"), { type: "number", name, min: 0 }));
    const range = element("span", "steps");
    [from.placeholder, to.placeholder] = [groups[0], groups[groups.length - 1]].map(g => String(g.step));
    from.setAttribute("aria-label", "From step");
    to.setAttribute("aria-label", "To step");
    range.append(from, element("span", "", "to"), to);
    const both = element("label", "", "Steps");
    both.append(range);
    filters.append(both);
    tests.push(g => (!from.value || g.step >= Number(from.value)) && (!to.value || g.step <= Number(to.value)));

    const search = field("Text of prompt or answer", Object.assign(element("input"), { type: "search", name: "text" }), "wide");
    tests.push(g => {
      const wanted = search.value.trim().toLowerCase();
      return !wanted || [g.prompt, ...g.answers.map(a => a.text)].some(t => t.toLowerCase().includes(wanted));
    });
    if (groups.some(g => g.uses)) {
      const again = Object.assign(element("input"), { type: "checkbox", name: "replayed" }), label = element("label", "check");
      label.append(again, element("span", "", "replayed only"));
      filters.append(label);
      tests.push(g => !again.checked || g.uses > 0);
    }

    function show() {
      const part = found.slice(at, at + PER_PAGE);
      list.replaceChildren(...part.map(g => group(g, images)));
      const where = found.length ? `${at + 1} to ${at + part.length} of ` : "";
      count.textContent = `${where}${found.length} ${found.length === 1 ? "group" : "groups"}`;
      back.disabled = at === 0;
      on.disabled = at + PER_PAGE >= found.length;
    }
    function filter() {
      found = groups.filter(g => tests.every(t => t(g)));
      at = 0;
      show();
    }
    let soon = 0;
    filters.addEventListener("input", () => { clearTimeout(soon); soon = setTimeout(filter, 120); });
    filters.addEventListener("submit", e => { e.preventDefault(); filter(); });
    const turn = by => { at += by; show(); box.scrollIntoView(); };
    back.addEventListener("click", () => turn(-PER_PAGE));
    on.addEventListener("click", () => turn(PER_PAGE));
    pager.append(back, on, count);
    box.append(filters, pager, list);
    filter();
  }

  function text(name, content) {
    const out = element("pre", `text ${name}`, content);
    out.dir = "auto";
    return out;
  }

  function group(g, images) {
    const out = element("article", "group"), head = element("div", "head"), answers = element("div", "answers");
    head.append(element("b", "", `Step ${g.step}`), element("span", `signal ${/^\w+$/.test(g.signal) ? g.signal : ""}`, title(g.signal)));
    for (const v of [g.task, g.prompt_id, ...Object.entries(g.slices).map(([k, s]) => `${k} ${s}`), `group ${g.group_id}`]) {
      if (v !== null) head.append(element("bdi", "", v));
    }
    if (g.uses) head.append(element("span", "replays", replayed(g)));
    out.append(head, text("prompt", g.prompt));
    if (g.images.length || g.images_left_out) out.append(pictures(g, images));
    answers.tabIndex = 0;
    answers.setAttribute("role", "group");
    answers.setAttribute("aria-label", `${g.answers.length} answers`);
    answers.append(...g.answers.map(answer));
    out.append(answers);
    return out;
  }

  function replayed(g) {
    const when = g.replays.map(([step, age]) => `${step} (age ${age ?? "unknown"})`).join(", ");
    const more = g.uses > g.replays.length ? ", ..." : "";
    return `replayed ${g.uses === 1 ? "once" : `${g.uses} times`}: at step ${when}${more}`;
  }

  function pictures(g, images) {
    const out = element("div", "pictures");
    for (const name of g.images) {
      const img = element("img");
      img.alt = `picture ${name}`;
      img.loading = "lazy";
      img.src = String(images[name]).startsWith("data:image/") ? images[name] : "data:,";
      out.append(img);
    }
    if (g.images_left_out) out.append(element("p", "empty", `${g.images_left_out} of its pictures are not shown.`));
    return out;
  }

  function answer(a) {
    const right = a.correct === 1, wrong = a.correct === 0, out = element("div", `answer ${right ? "right" : wrong ? "wrong" : ""}`);
    const mark = right ? "✓ " : wrong ? "✗ " : "";
    const facts = [`score ${short(a.score)}`, `advantage ${a.advantage > 0 ? "+" : ""}${short(a.advantage)}`, `${a.tokens ?? "–"} tokens`];
    if (!right && !wrong) facts.push(`correct ${short(a.correct)}`);
    if (a.ended === false) facts.push("cut by the length limit");
    out.append(element("bdi", "verdict", mark + (a.reason ?? "no reason")), text("", a.text), element("div", "facts", facts.map(f => f.replaceAll(" ", "\u00a0")).join(" · ")));
    return out;
  }

  axes();
  contents();
  document.querySelectorAll(".browser").forEach(browser);
})();
