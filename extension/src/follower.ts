// Which notebook is in front, and the bridge to its kernel; the one view that all views draw.
import type { ISessionContext } from '@jupyterlab/apputils';
import type { INotebookTracker, NotebookPanel } from '@jupyterlab/notebook';
import { NotebookActions } from '@jupyterlab/notebook';
import type { ISignal } from '@lumino/signaling';
import { Signal } from '@lumino/signaling';
import { Bridge } from './bridge';
import type { Answer, Arguments, IDjinn, LinkState, View } from './tokens';

const NOTHING: Answer = { ok: false, error: 'no kernel to ask' };

/** Follows the active notebook and the changes of its kernel. */
export class Follower implements IDjinn {
  constructor(private readonly _notebooks: INotebookTracker) {
    _notebooks.widgetAdded.connect((_, panel) => this._add(panel));
    _notebooks.forEach(panel => this._add(panel));
    _notebooks.currentChanged.connect(() => this._changed.emit(this.view));
  }

  get changed(): ISignal<this, View> {
    return this._changed;
  }

  get view(): View {
    const panel = this.panel;
    const bridge = this._bridge;
    return {
      link: this._link(panel, bridge),
      notebook: panel?.title.label ?? '',
      snapshot: bridge?.snapshot ?? null,
      urgent: bridge?.hasUrgentLine ?? true,
      waiting: bridge?.isWaiting ?? false
    };
  }

  get panel(): NotebookPanel | null {
    return this._notebooks.currentWidget;
  }

  async do(verb: string, args?: Arguments): Promise<Answer> {
    return this._bridge?.do(verb, args) ?? NOTHING;
  }

  /** Put code into a new cell below the active one; run: and run it. */
  async insert(code: string, run = false): Promise<void> {
    const panel = this.panel;
    if (panel) {
      await insertInto(panel, code, run);
    }
  }

  private get _bridge(): Bridge | null {
    return (this.panel && this._bridges.get(this.panel)) ?? null;
  }

  private _link(panel: NotebookPanel | null, bridge: Bridge | null): LinkState {
    if (!panel) {
      return 'no-notebook';
    }
    if (bridge) {
      return bridge.state;
    }
    const context = panel.sessionContext;
    return context.isReady || context.hasNoKernel ? 'no-kernel' : 'starting';
  }

  private _add(panel: NotebookPanel): void {
    const context = panel.sessionContext;
    const attach = () => this._attach(panel, context);
    context.kernelChanged.connect(attach);
    context.statusChanged.connect(() => this._tell(panel));
    panel.title.changed.connect(() => this._tell(panel));
    panel.disposed.connect(() => {
      this._bridges.get(panel)?.dispose();
      this._bridges.delete(panel);
    });
    attach();
  }

  private _attach(panel: NotebookPanel, context: ISessionContext): void {
    const kernel = context.session?.kernel ?? null;
    const had = this._bridges.get(panel);
    if (had?.kernel === kernel && kernel !== null) {
      return;
    }
    had?.dispose();
    this._bridges.delete(panel);
    if (kernel) {
      const bridge = new Bridge(kernel, code => {
        void insertInto(panel, code, false);
      });
      bridge.changed.connect(() => this._tell(panel));
      this._bridges.set(panel, bridge);
    }
    this._tell(panel);
  }

  private _tell(panel: NotebookPanel): void {
    if (panel === this.panel) {
      this._changed.emit(this.view);
    }
  }

  private readonly _bridges = new Map<NotebookPanel, Bridge>();
  private readonly _changed = new Signal<this, View>(this);
}

async function insertInto(
  panel: NotebookPanel,
  code: string,
  run: boolean
): Promise<void> {
  const notebook = panel.content;
  NotebookActions.insertBelow(notebook);
  const cell = notebook.activeCell;
  cell?.model.sharedModel.setSource(code);
  if (cell && run) {
    await NotebookActions.runCells(notebook, [cell], panel.sessionContext);
  }
}
