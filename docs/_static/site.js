// Marks what has to be scrolled to the right, for site.css.
addEventListener("DOMContentLoaded", () => {
  const wide =
    ".pst-scrollable-table-container, article pre, div.math mjx-container, p:has(> a > img), div.cell_output";
  const mark = (box) =>
    box.classList.toggle("continues", box.scrollWidth - box.clientWidth - box.scrollLeft > 2);
  const sizes = new ResizeObserver((changes) => changes.forEach(({ target }) => mark(target)));
  for (const box of document.querySelectorAll(wide)) {
    box.addEventListener("scroll", () => mark(box), { passive: true });
    sizes.observe(box);
  }
});
