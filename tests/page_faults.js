// What is wrong with how the open page is laid out: a sentence for each fault.
() => {
  const faults = [], width = document.documentElement.clientWidth, root = document.scrollingElement;
  if (root.scrollWidth > width) faults.push(`the page is ${root.scrollWidth} px wide, the window ${width}`);
  const said = text => JSON.stringify(text.trim().slice(0, 60));
  const parents = function* (element) { for (let at = element; at; at = at.parentElement) yield at; };
  const hidden = element => [...parents(element)].some(at =>
    ["SCRIPT", "STYLE", "NOSCRIPT", "TITLE"].includes(at.tagName) || getComputedStyle(at).visibility === "hidden"
    || getComputedStyle(at).display === "none" || getComputedStyle(at).opacity === "0");

  const colour = text => (text.match(/[\d.]+/g) || []).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(each => each / 255)
    .map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
    .reduce((sum, each, place) => sum + each * [0.2126, 0.7152, 0.0722][place], 0);
  const over = (front, back) => front.slice(0, 3).map((each, place) => each * (front[3] ?? 1) + back[place] * (1 - (front[3] ?? 1)));
  const dark = matchMedia("(prefers-color-scheme: dark)").matches && getComputedStyle(document.documentElement).colorScheme.includes("dark");
  const background = element => {
    for (const at of parents(element)) {
      const found = colour(getComputedStyle(at).backgroundColor);
      if (found.length && (found[3] ?? 1) > 0.5) return found;
    }
    return dark ? [18, 18, 18] : [255, 255, 255];
  };
  const contrast = element => {
    const style = getComputedStyle(element), back = background(element);
    const text = colour(element instanceof SVGElement ? style.fill : style.color);
    const [low, high] = [luminance(over(text, back)), luminance(back)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };

  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() || hidden(element)) continue;
    const style = getComputedStyle(element), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700), found = contrast(element);
    if (found < (large ? 3 : 4.5)) faults.push(`the contrast of ${said(node.data)} is ${found.toFixed(2)}`);
    const range = document.createRange();
    range.selectNodeContents(node);
    for (let box of range.getClientRects()) {
      box = { left: box.left, right: box.right, top: box.top, bottom: box.bottom };
      let scrolls = false;
      for (const at of parents(element)) {
        const { overflowX } = getComputedStyle(at), outer = at.getBoundingClientRect();
        if (["auto", "scroll"].includes(overflowX) && at !== document.body) {  // what is scrolled away is not seen
          scrolls = true;
          box.left = Math.max(box.left, outer.left);
          box.right = Math.min(box.right, outer.right);
        } else if (!scrolls && (["hidden", "clip"].includes(overflowX) || parseFloat(getComputedStyle(at).borderLeftWidth) > 0)
          && (box.left < outer.left - 1 || box.right > outer.right + 1 || box.top < outer.top - 1 || box.bottom > outer.bottom + 1))
          faults.push(`${said(node.data)} sticks out of its ${at.tagName}`);
      }
      if (box.right - box.left < 1 || box.bottom - box.top < 1) continue;
      if (box.left < -1 || box.right > width + 1) faults.push(`${said(node.data)} is outside of the window`);
      texts.push({ node, text: node.data, ...box });
    }
  }
  texts.sort((one, other) => one.top - other.top);
  texts.forEach((one, place) => {
    for (let at = place + 1; at < texts.length && texts[at].top < one.bottom - 2; at++) {
      const other = texts[at];
      if (other.node !== one.node && Math.min(one.right, other.right) - Math.max(one.left, other.left) > 1
        && Math.min(one.bottom, other.bottom) - other.top > 2)
        faults.push(`${said(one.text)} and ${said(other.text)} overlap`);
    }
  });
  return [...new Set(faults)];
}
