// What is wrong with the page as it is drawn now: a list of words, empty where all is well.
(width => {
  const wrong = [], seen = e => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== "hidden";
  const name = e => `${e.tagName}${e.className && e.className.baseVal === undefined ? "." + e.className : ""} "${(e.textContent || "").trim().slice(0, 40)}"`;
  const wide = document.scrollingElement.scrollWidth;
  if (wide > width || innerWidth !== width) wrong.push(`the page is ${Math.max(wide, innerWidth)} wide on a screen of ${width}`);

  const colour = text => {
    const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const behind = e => {
    const layers = [];
    for (let at = e; at; at = at.parentElement) layers.push(colour(getComputedStyle(at).backgroundColor));
    const base = matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18, 1] : [255, 255, 255, 1];
    return layers.reverse().reduce((under, top) => over(top, under), base);
  };
  const light = c => {
    const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);

  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !seen(e) || e.closest("title, desc")) continue;
    const style = getComputedStyle(e), drawn = e.ownerSVGElement;
    const size = parseFloat(style.fontSize) * (drawn ? drawn.getScreenCTM().a : 1);
    if (size < 12) wrong.push(`${name(e)}: ${size.toFixed(1)} px`);
    const back = behind(drawn ? drawn.parentElement : e), front = over(colour(drawn ? style.fill : style.color), back);
    if (contrast(front, back) < 4.5) wrong.push(`${name(e)}: contrast ${contrast(front, back).toFixed(2)}`);
  }

  for (const svg of document.querySelectorAll("svg[role=img]")) {
    if (!seen(svg)) continue;
    const label = (svg.getAttribute("aria-labelledby") || "").split(" ").map(id => document.getElementById(id));
    if (label.length !== 2 || label.some(e => !e || !e.textContent.trim())) wrong.push(`${name(svg)}: no title and description`);
    const box = svg.getBoundingClientRect();
    const outside = r => r.left < box.left - 1.5 || r.right > box.right + 1.5 || r.top < box.top - 1.5 || r.bottom > box.bottom + 1.5;
    for (const mark of svg.querySelectorAll("text, circle, rect, line, polyline, polygon, path"))
      if (outside(mark.getBoundingClientRect())) wrong.push(`${label[0]?.textContent}: ${name(mark)} is outside of its drawing`);
    const texts = [...svg.querySelectorAll("text")].map(t => [t, t.getBoundingClientRect()]);
    texts.forEach(([t, a], i) => texts.slice(i + 1).forEach(([u, b]) => {
      const x = Math.min(a.right, b.right) - Math.max(a.left, b.left), y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (x > 1 && y > 4) wrong.push(`${label[0]?.textContent}: ${name(t)} overlaps ${name(u)}`);
    }));
  }
  for (const figure of document.querySelectorAll("figure"))
    if (!figure.querySelector("details tbody tr")) wrong.push(`${name(figure)}: no table`);
  return wrong;
})
