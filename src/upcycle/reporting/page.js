(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const order = ["auto", "light", "dark"], key = "upcycle-report-theme";
  const remembered = () => { try { return localStorage.getItem(key); } catch { return null; } };
  const remember = (theme) => { try { localStorage.setItem(key, theme); } catch { /* not allowed: forgotten */ } };
  const show = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = `Colours: ${theme}`;
    button.dataset.now = theme;
  };
  show(order.includes(remembered()) ? remembered() : "auto");
  button.hidden = false;
  button.addEventListener("click", () => {
    const next = order[(order.indexOf(button.dataset.now) + 1) % order.length];
    show(next);
    remember(next);
  });
})();
