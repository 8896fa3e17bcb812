// Before the first paint: scripts run, and the colours that were chosen last time
document.documentElement.classList.add('js');
try { const t = localStorage.getItem('theme'); if (t) document.documentElement.dataset.theme = t; } catch (e) { /* storage is off: follow the system */ }
