// A part of the sidebar with a heading that opens and closes it.
import * as React from 'react';
import { caretDownIcon, caretRightIcon } from '@jupyterlab/ui-components';

export interface SectionProps {
  readonly title: string;
  /** beside the heading, also when closed */
  readonly note?: string;
  readonly startsClosed?: boolean;
  readonly children: React.ReactNode;
}

export function Section(props: SectionProps): React.ReactElement {
  const [open, setOpen] = React.useState(!props.startsClosed);
  const id = React.useId();
  const Caret = open ? caretDownIcon : caretRightIcon;
  return (
    <section className="jp-Djinn-section" aria-labelledby={id}>
      <h3 className="jp-Djinn-heading">
        <button
          type="button"
          id={id}
          className="jp-Djinn-disclosure"
          aria-expanded={open}
          onClick={() => setOpen(!open)}
        >
          <Caret.react tag="span" aria-hidden="true" />
          {props.title}
        </button>
        {props.note && <span className="jp-Djinn-note">{props.note}</span>}
      </h3>
      {open && <div className="jp-Djinn-body">{props.children}</div>}
    </section>
  );
}
